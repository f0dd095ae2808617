"""Tune an STDiT-XL/2 to rectified flow on 16 frames of 256x256, one epoch.

Starts from an STDiT-XL/2 trained with iddpm, such as the published OpenSora-v1-HQ-16x256x256.pth.

Hardware: GPUs with 40 GB. Model, optimizer and activations take about 19 GiB (estimated, in bf16), T5 9 GiB.
Command:  opensora-run opensora/train/16x256x256-spee-rflow --data-path clips.csv --nproc 8
"""

dataset = dict(
    type="VideoTextDataset",
    data_path=None,  # --data-path: a table with columns path and text
    num_frames=16,
    frame_interval=3,
    image_size=(256, 256),
)

model = dict(
    type="STDiT-XL/2",
    space_scale=0.5,
    time_scale=1,
    from_pretrained=None,  # --ckpt-path: a run folder, a file or a hub id
)
vae = dict(
    type="VideoAutoencoderKL",
    from_pretrained="stabilityai/sd-vae-ft-ema",
)
text_encoder = dict(
    type="t5",
    from_pretrained="DeepFloyd/t5-v1_1-xxl",
    model_max_length=120,
)
scheduler = dict(
    type="rflow",
)

batch_size = 16
grad_checkpoint = True
lr = 2e-5
grad_clip = 1.0
epochs = 1
seed = 42
dtype = "bf16"
num_workers = 4
log_every = 10
ckpt_every = 1000
