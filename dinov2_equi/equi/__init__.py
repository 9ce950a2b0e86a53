"""The equivariance branch: everything that `dinov2_equi` adds to DINOv2.

Read in this order: `geometry`, `families/`, `sampling`, `views` (what the images become), then `feature_split`,
`tokens`, `targets`, `decoders/`, `loss`, `reconstruction`, `metrics`, `branch` (what the network learns from them).
`theta_regression` is a control.
"""
