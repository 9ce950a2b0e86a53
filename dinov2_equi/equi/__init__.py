"""The equivariance branch: everything that `dinov2_equi` adds to DINOv2.

Read in this order: `geometry`, `families`, `sampling`, `views` (what the images become), then `feature_split`,
`decoder`, `loss`, `metrics`, `branch` (what the network learns from them).
"""
