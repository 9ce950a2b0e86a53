#!/usr/bin/env bash
# A real SLURM on this machine, for tests and for trying things out: one controller, two nodes, no systemd.
#
#   scripts/slurm_dev_cluster.sh start [--accounting]   start what does not run yet
#   scripts/slurm_dev_cluster.sh status                 nodes and jobs; exit code 1 where it does not run
#   scripts/slurm_dev_cluster.sh stop                   end all jobs and stop what `start` started
#
# Needs root (in a container too) and packages of Debian or Ubuntu, which it does not install:
#   apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge
# and slurmdbd mariadb-server mariadb-client for --accounting.
#
# Commands find the cluster by   export SLURM_CONF=/tmp/slurm_dev/slurm.conf
#
# Settings, by environment variables:
#   SLURM_DEV_DIR              /tmp/slurm_dev   configuration, state, logs; names of the nodes aside nothing is elsewhere
#   SLURM_DEV_CONTROLLER_PORT  16817
#   SLURM_DEV_NODE_PORT        16818            of the first node; each further one has the next
#   SLURM_DEV_DATABASE_PORT    16816            with --accounting
#   SLURM_DEV_NODES            2
#   SLURM_DEV_CPUS             of each node; default: those of the machine
#
# Partitions: dev; and for pre-emption dev_low (PreemptMode=CANCEL, a minute of GraceTime) and dev_low_now (REQUEUE, no
# GraceTime), whose jobs make way for those of dev_high.
#
# The nodes are called dev1, dev2, ...: while the cluster runs /etc/hosts says that they are this machine.
set -euo pipefail

COMMAND=${1:-help}
ACCOUNTING=no
DIR=${SLURM_DEV_DIR:-/tmp/slurm_dev}
CONTROLLER_PORT=${SLURM_DEV_CONTROLLER_PORT:-16817}
NODE_PORT=${SLURM_DEV_NODE_PORT:-16818}
DATABASE_PORT=${SLURM_DEV_DATABASE_PORT:-16816}
NUM_NODES=${SLURM_DEV_NODES:-2}
CPUS=${SLURM_DEV_CPUS:-$(env --unset=OMP_NUM_THREADS --unset=OMP_THREAD_LIMIT nproc)}  # which looks at both
PARTITIONS="dev dev_low dev_low_now dev_high"
HOST=$(hostname -s)
SOCKET=$DIR/munge/munge.socket
MARK="# slurm_dev_cluster.sh in [$DIR]"
export SLURM_CONF=$DIR/slurm.conf
export PATH=$PATH:/usr/sbin:/sbin  # of daemons; a user's shell may lack them

fail() { echo "error: $*" >&2; exit 1; }

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; }

# ------------------------------------------------------------------------------------------------------------ processes

# A number alone is no proof: after a restart of the machine another process may have it.
runs() {  # name of the pid file, program
  local pid
  pid=$(cat "$DIR/run/$1.pid" 2> /dev/null) && [ -n "$pid" ] &&
    [ "$(cat "/proc/$pid/comm" 2> /dev/null)" = "$2" ] && ! grep -q '^State:.Z' "/proc/$pid/status"
}

halt() {  # name of the pid file, program
  local pid
  if runs "$1" "$2"; then
    pid=$(cat "$DIR/run/$1.pid")
    kill "$pid" 2> /dev/null || true
    for _ in $(seq 100); do runs "$1" "$2" || break; sleep 0.1; done
    kill -KILL "$pid" 2> /dev/null || true
  fi
  rm -f "$DIR/run/$1.pid"
}

wait_for() {  # seconds, log, what it is, command
  local deadline=$((SECONDS + $1)) log=$DIR/log/$2 what=$3
  shift 3
  until "$@" > /dev/null 2>&1; do
    if [ "$SECONDS" -ge "$deadline" ]; then
      tail -n 5 "$log" >&2 || true
      fail "$what did not come up; its log is $log"
    fi
    sleep 0.1
  done
}

require_programs() {
  local missing="" pair
  for pair in "$@"; do command -v "${pair%:*}" > /dev/null || missing="$missing ${pair#*:}"; done
  [ -z "$missing" ] || fail "missing packages, install them as root: apt-get install -y --no-install-recommends" \
    "$(tr ' ' '\n' <<< "${missing# }" | sort -u | tr '\n' ' ')"
}

# ---------------------------------------------------------------------------------------------------------------- parts

start_munge() {
  munge --socket="$SOCKET" -n > /dev/null 2>&1 && return
  mkdir -p "$DIR/munge"
  chmod 755 "$DIR/munge"
  [ -s "$DIR/munge/key" ] || { head -c 1024 /dev/urandom > "$DIR/munge/key"; chmod 400 "$DIR/munge/key"; }
  munged --force --socket="$SOCKET" --key-file="$DIR/munge/key" --pid-file="$DIR/run/munged.pid" \
    --log-file="$DIR/log/munged.log" --seed-file="$DIR/munge/seed" < /dev/null > /dev/null 2>&1
  wait_for 20 munged.log munged munge --socket="$SOCKET" -n
}

sql() { mariadb --no-defaults --user=root --socket="$DIR/mysql/socket" "$@"; }

start_database() {
  if ! runs mariadb mariadbd; then
    if [ ! -d "$DIR/mysql/mysql" ]; then
      mkdir -p "$DIR/mysql"
      chown mysql: "$DIR/mysql"
      mariadb-install-db --no-defaults --user=mysql --datadir="$DIR/mysql" \
        --auth-root-authentication-method=normal > "$DIR/log/mariadb.log" 2>&1
    fi
    chmod 1777 "$DIR/run"
    setsid mariadbd --no-defaults --user=mysql --datadir="$DIR/mysql" --socket="$DIR/mysql/socket" --skip-networking \
      --pid-file="$DIR/run/mariadb.pid" --innodb-lock-wait-timeout=900 >> "$DIR/log/mariadb.log" 2>&1 < /dev/null &
    wait_for 60 mariadb.log MariaDB sql -e "select 1"
  fi
  sql -e "create database if not exists slurm; create user if not exists slurm@localhost identified by 'dev';
    grant all on slurm.* to slurm@localhost;"
  # The library that slurmdbd uses looks for the server at this place alone.
  mkdir -p /run/mysqld
  [ -S /run/mysqld/mysqld.sock ] || ln -sfn "$DIR/mysql/socket" /run/mysqld/mysqld.sock
  printf '%s\n' AuthType=auth/munge "AuthInfo=socket=$SOCKET" DbdHost=localhost "DbdPort=$DATABASE_PORT" SlurmUser=root \
    StorageType=accounting_storage/mysql StorageHost=localhost StorageUser=slurm StoragePass=dev StorageLoc=slurm \
    "PidFile=$DIR/run/slurmdbd.pid" "LogFile=$DIR/log/slurmdbd.log" > "$DIR/slurmdbd.conf"
  chmod 600 "$DIR/slurmdbd.conf"
  runs slurmdbd slurmdbd || slurmdbd < /dev/null > /dev/null 2>&1
  wait_for 60 slurmdbd.log slurmdbd sacctmgr --noheader list cluster
  sacctmgr --noheader --immediate list cluster | grep -qw dev || sacctmgr --immediate add cluster dev > /dev/null
}

write_config() {
  {
    printf '%s\n' ClusterName=dev "SlurmctldHost=$HOST(127.0.0.1)" "SlurmctldPort=$CONTROLLER_PORT" \
      SlurmUser=root SlurmdUser=root AuthType=auth/munge CryptoType=crypto/munge \
      "# Several clusters on one machine: the ports at which tasks meet are made from the numbers of their jobs." \
      "FirstJobId=$((1 + RANDOM % 20000))" \
      "# A job that is queued again waits until its credentials have expired: 120 s unless told otherwise." \
      "AuthInfo=socket=$SOCKET,cred_expire=6" MpiDefault=none ProctrackType=proctrack/linuxproc TaskPlugin=task/none \
      SwitchType=switch/none SelectType=select/cons_tres SelectTypeParameters=CR_CPU \
      SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0 KillWait=10 ReturnToService=2 \
      PreemptType=preempt/partition_prio PreemptMode=REQUEUE \
      SlurmdParameters=config_overrides "StateSaveLocation=$DIR/state" "SlurmdSpoolDir=$DIR/spool/%n" \
      "SlurmctldPidFile=$DIR/run/slurmctld.pid" "SlurmdPidFile=$DIR/run/%n.pid" \
      "SlurmctldLogFile=$DIR/log/slurmctld.log" "SlurmdLogFile=$DIR/log/%n.log"
    if [ "$ACCOUNTING" = yes ]; then
      printf '%s\n' AccountingStorageType=accounting_storage/slurmdbd AccountingStorageHost=localhost \
        "AccountingStoragePort=$DATABASE_PORT" "AccountingStoragePass=$SOCKET" JobAcctGatherType=jobacct_gather/linux
    fi
    for number in $(seq "$NUM_NODES"); do
      echo "NodeName=dev$number NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$((NODE_PORT + number - 1))" \
        "CPUs=$CPUS RealMemory=1024 State=UNKNOWN"
    done
    printf 'PartitionName=%s Nodes=ALL MaxTime=INFINITE State=UP\n' \
      "dev Default=YES OverSubscribe=FORCE:4 PreemptMode=OFF" "dev_low PreemptMode=CANCEL GraceTime=60" \
      "dev_low_now PreemptMode=REQUEUE GraceTime=0" "dev_high PriorityTier=2 PreemptMode=OFF"
  } > "$SLURM_CONF.new"
  mv "$SLURM_CONF.new" "$SLURM_CONF"
}

configured_nodes() { cat "$SLURM_CONF" 2> /dev/null | grep -c '^NodeName=' || true; }

# Containers mount /etc/hosts: it can be written to, but not replaced.
forget_names() {
  local kept
  grep -qF "$MARK" /etc/hosts || return 0
  kept=$(grep -vF "$MARK" /etc/hosts || true)
  printf '%s\n' "$kept" > /etc/hosts
}

announce_names() {
  forget_names
  for number in $(seq "$NUM_NODES"); do echo "127.0.0.1 dev$number $MARK" >> /etc/hosts; done
}

is_up() { [ "$(timeout 10 sinfo --noheader --partition=dev --Node --format=%T | grep -cE '^(idle|mixed|allocated)$')" -ge "$NUM_NODES" ]; }

# ------------------------------------------------------------------------------------------------------------- commands

start() {
  [ "$(id -u)" = 0 ] || fail "needs root: the daemons start jobs for others"
  require_programs munged:munge munge:munge slurmctld:slurmctld slurmd:slurmd sinfo:slurm-client
  [ "$ACCOUNTING" = no ] || require_programs slurmdbd:slurmdbd mariadbd:mariadb-server mariadb:mariadb-client
  mkdir -p "$DIR"/{run,log,state,spool}
  chmod 755 "$DIR"
  start_munge
  if runs slurmctld slurmctld; then
    NUM_NODES=$(configured_nodes)  # what runs keeps its settings
  else
    write_config
    [ "$ACCOUNTING" = no ] || start_database
    slurmctld -f "$SLURM_CONF" < /dev/null >> "$DIR/log/slurmctld.log" 2>&1 || wait_for 0 slurmctld.log slurmctld false
  fi
  announce_names
  for number in $(seq "$NUM_NODES"); do
    mkdir -p "$DIR/spool/dev$number"
    runs "dev$number" slurmd || slurmd -f "$SLURM_CONF" -N "dev$number" < /dev/null >> "$DIR/log/dev$number.log" 2>&1 ||
      wait_for 0 "dev$number.log" "node dev$number" false
  done
  wait_for 60 slurmctld.log "a node" is_up
  status
  echo "export SLURM_CONF=$SLURM_CONF"
}

status() {
  runs slurmctld slurmctld || { echo "not running in $DIR"; exit 1; }
  timeout 20 sinfo --partition=dev --Node --format='%N %T %c CPUs'
  timeout 20 squeue --format='%i %j %T %M %R'
}

stop() {
  [ "$(id -u)" = 0 ] || fail "needs root: the daemons are root's"
  if runs slurmctld slurmctld; then
    for partition in $PARTITIONS; do timeout 20 scancel --partition="$partition" 2> /dev/null || true; done
    for _ in $(seq 100); do [ -n "$(timeout 10 squeue --noheader 2> /dev/null)" ] || break; sleep 0.2; done
  fi
  for number in $(seq "$(configured_nodes)"); do halt "dev$number" slurmd; done
  halt slurmctld slurmctld
  halt slurmdbd slurmdbd
  halt mariadb mariadbd
  halt munged munged
  forget_names
  [ "$(readlink /run/mysqld/mysqld.sock 2> /dev/null)" != "$DIR/mysql/socket" ] || rm -f /run/mysqld/mysqld.sock
  echo "stopped; configuration, state and logs stay in $DIR"
}

case "$*" in
  start | status | stop) "$COMMAND" ;;
  "start --accounting") ACCOUNTING=yes; start ;;
  "" | help | --help | -h) usage ;;
  *) usage >&2; exit 2 ;;
esac
