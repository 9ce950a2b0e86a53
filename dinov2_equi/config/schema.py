"""Every key of the configuration, with its type, default and meaning.

The keys of DINOv2 keep their names and defaults, so its training YAMLs load unchanged. Ours are added to its sections
or stand in sections of their own: `equi`, `data`, `logging`. A YAML in `configs/` states only what differs from here.

Conventions: sizes in pixels of a square crop; durations carry their unit in the name; one "epoch" is
`train.OFFICIAL_EPOCH_LENGTH` steps, whatever the size of the data set; 0 or null switches off or means "choose for me"
only where the text under the key says so. Ranges are checked in `validate.py`.

Source: keys and defaults of DINOv2 after its `ssl_default_config.yaml`; `equi` after Wang et al., AAAI-26, section 4.1
and table 2.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ModelConfig:
    """DINOv2's `MODEL` section."""

    WEIGHTS: str = ""
    """File with the weights of a whole model to start from when there is nothing to resume; empty: start afresh."""


@dataclass
class MixedPrecisionConfig:
    """Number formats of one sharded network: each `fp32`, `fp16` or `bf16`."""

    param_dtype: str = "fp16"
    """Format in which sharded blocks and heads are gathered, where `compute_precision.autocast` comes to bf16: `bf16`
    and `fp16` both mean bf16, which needs no loss scaling. The optimiser's copy is fp32."""

    reduce_dtype: str = "fp16"
    """Format in which sharded gradients are summed over the processes: `bf16`, or fp32, which `fp16` means too. The
    teacher has none."""

    buffer_dtype: str = "fp32"
    """Accepted for DINOv2's files, without effect here: the networks have no buffers."""


@dataclass
class ModulePrecisionConfig:
    """Sharding and number formats of one network."""

    sharding_strategy: str = "SHARD_GRAD_OP"
    """Of several processes, where the parameters, gradients and moments of this network lie. `NO_SHARD`: whole on each.
    `SHARD_GRAD_OP`: each has some rows, and gathers the rest from the forward to the backward pass. `FULL_SHARD`: lets
    them go in between, for less memory. `HYBRID_SHARD` or `hybrid`: so inside a machine, with a copy on each machine.
    Student and teacher must agree. A single process shards nothing."""

    mixed_precision: MixedPrecisionConfig = field(default_factory=MixedPrecisionConfig)


def _student_head_precision() -> ModulePrecisionConfig:
    """Return DINOv2's default for the heads of the student: gradients reduced in fp32."""
    return ModulePrecisionConfig(mixed_precision=MixedPrecisionConfig(reduce_dtype="fp32"))


@dataclass
class TeacherPrecisionConfig:
    """Sharding and number formats of the teacher's networks."""

    backbone: ModulePrecisionConfig = field(default_factory=ModulePrecisionConfig)
    dino_head: ModulePrecisionConfig = field(default_factory=ModulePrecisionConfig)
    ibot_head: ModulePrecisionConfig = field(default_factory=ModulePrecisionConfig)


@dataclass
class StudentPrecisionConfig:
    """Sharding and number formats of the student's networks; decoder and expander follow its backbone, in fp32."""

    backbone: ModulePrecisionConfig = field(default_factory=ModulePrecisionConfig)
    dino_head: ModulePrecisionConfig = field(default_factory=_student_head_precision)
    ibot_head: ModulePrecisionConfig = field(default_factory=_student_head_precision)


@dataclass
class ComputePrecisionConfig:
    """Number formats of the computation."""

    grad_scaler: bool = True
    """Accepted for DINOv2's files, without effect here: bf16 and fp32 need no loss scaling."""

    autocast: str = "auto"
    """Format of the matrix products: `fp32`, `bf16`, or `auto` for bf16 on CUDA and fp32 on the CPU. The losses are
    always fp32."""

    teacher: TeacherPrecisionConfig = field(default_factory=TeacherPrecisionConfig)
    student: StudentPrecisionConfig = field(default_factory=StudentPrecisionConfig)


@dataclass
class HeadConfig:
    """Projection head: a perceptron, L2 normalisation, and a weight-normalised layer to the prototypes."""

    head_n_prototypes: int = 65536
    """Output width, K."""

    head_bottleneck_dim: int = 256
    """Width before the last layer, where the features are normalised."""

    head_nlayers: int = 3
    """Number of layers of the perceptron."""

    head_hidden_dim: int = 2048
    """Hidden width of the perceptron."""


@dataclass
class DinoConfig(HeadConfig):
    """Loss and head of the class tokens."""

    loss_weight: float = 1.0
    """Multiplier of the cross-entropy between the class tokens of student and teacher."""

    koleo_loss_weight: float = 0.1
    """Multiplier of the KoLeo regulariser, which spreads the class tokens of a batch."""


@dataclass
class IbotConfig(HeadConfig):
    """Loss, masks and head of the masked patch tokens."""

    loss_weight: float = 1.0
    """Multiplier of the cross-entropy between the masked patch tokens of student and teacher."""

    mask_sample_probability: float = 0.5
    """Share of the global crops that are masked, in [0, 1]."""

    mask_ratio_min_max: list[float] = field(default_factory=lambda: [0.1, 0.5])
    """Smallest and largest share of masked patches in a masked crop: [min, max] in [0, 1]."""

    separate_head: bool = False
    """True: a head of its own, described by the `head_*` keys. False: the head of `dino` serves the patches too."""


@dataclass
class VicregConfig:
    """VICReg loss of the two global crops, in place of DINO's and iBOT's losses or beside them."""

    loss_weight: float = 0.0
    """Multiplier of the three terms together; 0: no VICReg, nothing is built."""

    invariance_weight: float = 10.0
    """Multiplier of the squared difference of the two embeddings. Source: SIE, which the paper follows."""

    variance_weight: float = 10.0
    """Multiplier of the hinge on the standard deviation of each channel."""

    covariance_weight: float = 1.0
    """Multiplier of the squared covariances of different channels."""

    features: str = "patch_mean"
    """What is compared: `patch_mean`, the mean of the patch tokens, or `cls`, the class token; the invariant part."""

    expander_dim: int = 2048
    """Hidden and output width of the expander, a perceptron with batch norm."""

    expander_nlayers: int = 3
    """Number of layers of the expander."""


@dataclass
class TrainConfig:
    """Data, batch, checkpoints and device of a run."""

    batch_size_per_gpu: int = 64
    """Images that pass a network at once in one process; with `gradient_accumulation_steps` 1 all that it takes in a
    step, B."""

    gradient_accumulation_steps: int = 1
    """Parts of `batch_size_per_gpu` images in which a process passes those of a step through the backbones, to save
    memory. The losses see them all: as many images in other parts give the same numbers. Above 1 the student passes
    once more in each step."""

    dataset_path: str = "ImageNet:split=TRAIN"
    """Data set: the path of a folder of images, of a list, a table, a pattern or tar shards, or a form such as
    `ImageNet:split=TRAIN:root=...`, `sample_photos` or `mix:3*DATASET + 1*DATASET`; see docs/data.md."""

    output_dir: str = "."
    """Folder of the run; `--output-dir` replaces it."""

    saveckp_freq: int = 20
    """Accepted for DINOv2's files, without effect there and here: see `checkpoint_every_steps`."""

    seed: int = 0
    """Seed of the initial weights, the order of the data, the augmentation and the masks."""

    num_workers: int = 10
    """Processes that load data, for each training process; 0 loads in the training process itself."""

    OFFICIAL_EPOCH_LENGTH: int = 1250
    """Steps in an "epoch", the unit of the schedules below."""

    cache_dataset: bool = True
    """Accepted for DINOv2's files, without effect there and here."""

    centering: str = "centering"
    """How the teacher's outputs are kept from collapsing: `centering` or `sinkhorn_knopp`."""

    checkpoint_every_steps: int = 0
    """Steps between two checkpoints; 0: three epochs, as DINOv2. The last step is always saved."""

    checkpoint_keep: int = 3
    """Number of checkpoints kept; older ones are deleted."""

    async_checkpoint: bool = False
    """Write checkpoints while the training goes on, from a copy in the memory of the CPU: weights, teacher and moments
    once more. The last checkpoint, and that of a signal, are always waited for."""

    compile: bool = False
    """Compile each block of the backbones with `torch.compile`: some minutes at the start, faster steps on a GPU. Where
    it does not work the run goes on without, and the log says why."""

    activation_checkpointing: str = "none"
    """`none`, or `full`: keep only the input of each block of the student and compute the rest again in the backward
    pass. The same gradients with a fraction of the memory, for a third more time. `selective` keeps the results of
    the linear layers too, and computes the rest again."""

    max_nonfinite_steps: int = 3
    """Steps in a row whose loss or gradient may be NaN or infinite. Such a step is skipped; after so many the run goes
    back to the weights of its last checkpoint, or stops if it has been there already."""

    watchdog_seconds: float = 1800.0
    """Seconds that a step, a checkpoint or the wait for images may take. After more every process writes where it
    stands to `logs/stacks.rank*.txt` and ends with exit code 124. 0: wait for ever."""

    device: str = "auto"
    """`cpu`, `cuda`, or `auto` for CUDA where it is available."""

    num_threads: int = 0
    """CPU threads of torch in each training process; 0: torch decides."""


@dataclass
class StudentConfig:
    """Backbone. The teacher is its moving average."""

    arch: str = "vit_large"
    """Name of the backbone: a key of `models.registry.ARCHS`."""

    patch_size: int = 16
    """Side of a patch, in pixels."""

    drop_path_rate: float = 0.3
    """Probability of skipping a residual branch, in [0, 1); in the student only."""

    layerscale: float = 1.0e-05
    """Initial value of LayerScale; 0 leaves LayerScale out."""

    drop_path_uniform: bool = True
    """True: the same rate in all blocks. False: growing linearly from 0 in the first to the rate in the last."""

    pretrained_weights: str = ""
    """File with weights to start from: a teacher checkpoint or a backbone, ours, DINOv2's, timm's or transformers'. The
    position embedding is resampled to the crop size; heads are taken where they fit. Empty: random weights."""

    ffn_layer: str = "mlp"
    """Feed-forward layer: `mlp`, `swiglu`, `swiglufused` or `identity`."""

    block_chunks: int = 0
    """Number of groups of blocks; 0: one flat list. Changes the names of the parameters, as in DINOv2."""

    qkv_bias: bool = True
    """Bias in the projection to queries, keys and values."""

    proj_bias: bool = True
    """Bias in the output projection of the attention."""

    ffn_bias: bool = True
    """Bias in the feed-forward layer."""

    num_register_tokens: int = 0
    """Number of register tokens between the class token and the patch tokens."""

    interpolate_antialias: bool = False
    """Antialiasing when position embeddings are resized."""

    interpolate_offset: float = 0.1
    """Added to the grid size when position embeddings are resized; 0 resizes to the exact size."""


@dataclass
class TeacherConfig:
    """Moving average of the student, and the temperature of its outputs."""

    momentum_teacher: float = 0.992
    """Momentum of the moving average at the first step, in [0, 1]."""

    final_momentum_teacher: float = 1.0
    """Momentum at the last step; a cosine in between."""

    warmup_teacher_temp: float = 0.04
    """Temperature of the teacher's softmax at the first step."""

    teacher_temp: float = 0.07
    """Temperature after the warm-up."""

    warmup_teacher_temp_epochs: int = 30
    """Length of the linear warm-up of the temperature, in epochs."""


@dataclass
class OptimConfig:
    """AdamW and its schedules. All durations are in epochs of `train.OFFICIAL_EPOCH_LENGTH` steps."""

    epochs: int = 100
    """Length of the run."""

    weight_decay: float = 0.04
    """Weight decay at the first step."""

    weight_decay_end: float = 0.4
    """Weight decay at the last step; a cosine in between."""

    base_lr: float = 0.004
    """Peak learning rate for a batch of 1024 images; see `scaling_rule`."""

    lr: float = 0.0
    """Accepted for DINOv2's files, without effect: the learning rate is derived from `base_lr` and the batch size."""

    warmup_epochs: int = 10
    """Length of the linear warm-up of the learning rate."""

    min_lr: float = 1.0e-06
    """Learning rate at the last step; a cosine from the peak."""

    clip_grad: float = 3.0
    """Largest gradient norm of each part of the student; 0: no clipping."""

    freeze_last_layer_epochs: int = 1
    """Time during which the last layer of the heads is not trained."""

    scaling_rule: str = "sqrt_wrt_1024"
    """`sqrt_wrt_1024`: learning rate = base_lr * sqrt(images in a step / 1024)."""

    patch_embed_lr_mult: float = 0.2
    """Multiplier of the learning rate of the patch embedding."""

    layerwise_decay: float = 0.9
    """Factor of the learning rate from each block to the one before it, in (0, 1]; 1: the same for all."""

    adamw_beta1: float = 0.9
    """AdamW's decay of the mean gradient, in [0, 1)."""

    adamw_beta2: float = 0.999
    """AdamW's decay of the mean squared gradient, in [0, 1)."""


@dataclass
class CropsConfig:
    """Multi-crop augmentation."""

    global_crops_scale: list[float] = field(default_factory=lambda: [0.32, 1.0])
    """Smallest and largest share of the image's area in a global crop: [min, max]."""

    local_crops_number: int = 8
    """Local crops of an image, L; 0: none."""

    local_crops_scale: list[float] = field(default_factory=lambda: [0.05, 0.32])
    """Smallest and largest share of the image's area in a local crop: [min, max]."""

    global_crops_size: int = 224
    """Side of a global crop, in pixels; a multiple of `student.patch_size`."""

    local_crops_size: int = 96
    """Side of a local crop, in pixels; a multiple of `student.patch_size`."""

    blur: str = "intended"
    """`intended`: blur as often as its probability says. `dinov2_released`: the inverted probabilities with which
    DINOv2's released weights were trained."""

    color_jitter_prob: float = 0.8
    """Probability of jittering brightness, contrast, saturation and hue of a crop."""

    gray_prob: float = 0.2
    """Probability of taking the colour out of a crop."""

    solarize_prob: float = 0.2
    """Probability of solarising the second global crop."""


@dataclass
class DecoderConfig:
    """Decoder that reconstructs the images on the transformation path."""

    type: str = "transformer"
    """`transformer`, or `upconv` for the paper's linear layer and up-convolutions: a key of
    `equi.decoders.registry.DECODERS`."""

    depth: int = 2
    """Number of blocks; `transformer` alone."""

    width: int | None = None
    """Width of its tokens, or channels before the first up-convolution; null: scaled to the backbone, or 256."""

    num_heads: int | None = None
    """Attention heads; null: scaled to the width. `transformer` alone."""

    mlp_ratio: float = 4.0
    """Hidden width of its feed-forward layers divided by `width`; `transformer` alone."""

    shared: bool = True
    """True: one module draws all images, told by a learned query which. False: one module an image. `transformer`
    alone; the up-convolutions are always one module an image."""

    patch_fraction: float = 1.0
    """Share of the patches, drawn at random in each step, that are reconstructed; in (0, 1]. `transformer` alone."""

    half_resolution: bool = False
    """Reconstruct at half the resolution: a quarter of the pixels, each the mean of four."""


@dataclass
class EquiConfig:
    """Equivariance branch. With `family` null the data are untouched, nothing is built, and the run is DINOv2."""

    family: str | None = None
    """Extra transform of the second global crop: a key of `equi.families.registry.FAMILIES`; null: none."""

    loss_weight: float = 0.0
    """Multiplier of the reconstruction loss. 0 with a family set is the control run: the transform without the loss.
    Source: lambda = 1 in the paper, equation 4."""

    num_steps: int = 2
    """Images reconstructed between the two views, S (the paper's K)."""

    include_final: bool = False
    """Reconstruct the second view itself as well, the end of the path."""

    target: str = "path"
    """What is reconstructed: `path`, the images between the views. The others are controls: `untransformed`, `view_2`
    (the ends of the path), `view_1`, `masked` (hidden patches of view 1 from its visible ones) and `theta` (no image
    but the parameters themselves). Source: a key of `equi.targets.TARGETS`."""

    layer: str = "last"
    """Block whose tokens hold the equivariant part: `last`, or a number counted from 0. The SSL losses always see the
    last block."""

    source_2: str = "student"
    """Whose tokens of view 2 the decoder sees: `student`, with gradient, or `teacher`, without."""

    only_unmasked: bool = False
    """Reconstruct only images of which no patch is hidden from the student, in neither view."""

    dim: int | None = None
    """Width of the equivariant part of a token; null: a quarter of the token width (512 of 2048 in the paper)."""

    projection_dim: int | None = None
    """Width of a linear layer between backbone and split; null: the backbone's channels are split themselves."""

    split_without_transform: bool = False
    """True, where `family` is null: the features are projected and divided all the same, and the SSL losses see the
    invariant part alone. The baseline with the projection and the heads of a run with the branch."""

    use_cls: bool = False
    """True: the decoder also sees the equivariant part of the class token."""

    fill: str = "reflect"
    """What a transform puts where it has no pixel: `reflect` or `zeros`. Zeros show the angle in the black corners."""

    max_rotation_deg: float = 45.0
    """Rotations are uniform in [-max, max] degrees. Source: paper, table 2."""

    max_translation_px: float = 10.0
    """Translations are uniform in [-max, max] along each axis, in pixels of a 224-pixel crop; scaled with the crop.
    Source: paper, table 2, which names no unit."""

    max_brightness: float = 0.4
    """Brightness is multiplied by 1 + delta, delta uniform in [-max, max]. Source of the colours: paper, table 2."""

    max_contrast: float = 0.4
    """The same for contrast."""

    max_saturation: float = 0.1
    """The same for saturation. The paper's table can also be read as 0.4."""

    max_hue: float = 0.1
    """The hue is shifted by a number of turns uniform in [-max, max]; at most 0.5."""

    blur_sigma_px: list[float] = field(default_factory=lambda: [0.1, 2.0])
    """Least and greatest standard deviation of the blur, in pixels of the crop as it is: [min, max]. Source: paper,
    table 2."""

    max_zoom: float = 1.25
    """Magnifications are in [1 / max, max], uniform on a logarithmic scale; above 1."""

    max_corner_px: float = 20.0
    """Each corner is shifted by an offset uniform in [-max, max] along each axis, in pixels of a 224-pixel crop."""

    mixture: list[str] = field(default_factory=lambda: ["se2", "color", "blur"])
    """Families of which the family `mixture` draws one for each image."""

    decoder: DecoderConfig = field(default_factory=DecoderConfig)


@dataclass
class DataConfig:
    """How images are read and normalised, and which are kept back from training."""

    in_channels: int = 3
    """Channels of the images. 3: photographs, any file becomes 8-bit RGB. Another number (or `value_range`): npy, TIFF
    and other files of that many channels, in full precision; grey, solarisation and the jitter of saturation and hue
    are left out."""

    value_range: list[float] = field(default_factory=list)
    """Values of a file that become 0 and 1: [low, high]; what lies outside is cut off. Empty: the range of 8 or 16
    bits. If set, images of three channels are read channel by channel too."""

    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """Mean of each channel of images in [0, 1]; `scripts/dataset_stats.py` measures it."""

    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """Standard deviation of the channels."""

    augment_on: str = "cpu"
    """Where crops are resized and coloured. `cpu`: in the loader's processes. `device`: on the training device, a whole
    batch at once, which leaves to the processes little more than reading the files. The choices are the same, pixels
    differ by rounding."""

    max_bad_fraction: float = 0.1
    """Greatest share of images that cannot be used (damaged, too small, too long), in [0, 1]. Others take their place,
    `bad_images.jsonl` lists them; above this share the training stops. Before 1,000 images, it is a share of 1,000."""

    holdout_fraction: float = 0.0
    """Share of the training images kept back for the report's pictures and probe, in [0, 1); 0: none. The data set
    `sample_photos` always keeps back whole photographs."""

    holdout_path: str = ""
    """Data set used for them instead, in the form of `train.dataset_path`; empty: keep back a share."""


@dataclass
class LoggingConfig:
    """What a run writes about itself."""

    metrics_every_steps: int = 10
    """Steps between two lines of `training_metrics.json`."""

    tensorboard: bool = True
    """Write TensorBoard event files too."""

    diagnostics_every_steps: int = 100
    """Steps between two measurements of how the branch pulls against the other losses (ratio of the gradient norms at
    the output of the last block), of how the two parts of the features are used, and of how far the features tell
    images apart (`collapse/*`, with a warning where they do not); 0: none."""

    pictures_every_steps: int = 0
    """Steps between two pictures of reconstructions; 0: only in the report at the end."""

    report: bool = True
    """Write `report.html` at the end."""


@dataclass
class EvaluationConfig:
    """Evaluation during and after training."""

    eval_period_iterations: int = 12500
    """Steps between two exports of the teacher's weights, each followed by `tasks`; 0: only an export at the end."""

    tasks: list[str] = field(default_factory=lambda: ["knn", "linear", "equivariance"])
    """What is measured of the teacher while training, of `knn`, `linear` and `equivariance`; logged as `eval/*`. The
    first two need classes, the last held-back images; what cannot be measured is left out. A failure stops nothing."""

    in_process: bool = True
    """Measure in the training's process, which waits. false: it only exports, and `run/evaluate.py RUN --follow`
    measures as a job of its own."""

    train_dataset_path: str = ""
    """Labelled images for `knn` and `linear`, in the form of `train.dataset_path`; empty: the training images."""

    val_dataset_path: str = ""
    """Labelled images that are classified; empty: the held-back images."""

    max_images: int = 5000
    """Images of either kind at most, evenly spread."""

    best_metric: str = ""
    """Keep the teacher for which this is highest in `best/`: `knn`, `linear` or `r2_rotation`; empty: none."""

    probe: bool = True
    """At the end, regress the transform from the features of held-back image pairs, and say how well that works."""

    probe_train_pairs: int = 4096
    """Image pairs on which the regression is trained."""

    probe_test_pairs: int = 1024
    """Image pairs on which it is tested."""

    probe_epochs: int = 40
    """Passes over the training pairs."""

    probe_size: int = 0
    """Side of the probe's images, in pixels, a multiple of `student.patch_size`; 0: `crops.global_crops_size`."""

    batch_size: int = 64
    """Images in a batch of the evaluation."""


@dataclass
class Config:
    """The whole configuration. Only `run/` and `train/` see it; all below take plain arguments."""

    MODEL: ModelConfig = field(default_factory=ModelConfig)
    compute_precision: ComputePrecisionConfig = field(default_factory=ComputePrecisionConfig)
    dino: DinoConfig = field(default_factory=DinoConfig)
    ibot: IbotConfig = field(default_factory=IbotConfig)
    vicreg: VicregConfig = field(default_factory=VicregConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    crops: CropsConfig = field(default_factory=CropsConfig)
    equi: EquiConfig = field(default_factory=EquiConfig)
    data: DataConfig = field(default_factory=DataConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
