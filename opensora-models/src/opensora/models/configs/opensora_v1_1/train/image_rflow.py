"""Tune PixArt-alpha, published at 512x512, to rectified flow on captioned images of 256x256.

The first step from noise prediction (iddpm) to straight paths, which need fewer sampling steps.

Hardware: GPUs with 40 GB. Model, optimizer and activations take about 13 GiB (estimated, in bf16), T5 9 GiB.
Command:  opensora-run opensora-v1-1/train/image_rflow --data-path images.csv --nproc 8
"""

dataset = dict(
    type="VideoTextDataset",
    data_path=None,  # --data-path: a table with columns path and text
    num_frames=1,
    frame_interval=1,
    image_size=(256, 256),
    transform_name="center",
)

model = dict(
    type="PixArt-XL/2",
    space_scale=1,
    time_scale=1,
    no_temporal_pos_emb=True,
    from_pretrained="PixArt-XL-2-512x512.pth",
)
vae = dict(
    type="VideoAutoencoderKL",
    from_pretrained="stabilityai/sd-vae-ft-ema",
    micro_batch_size=4,
)
text_encoder = dict(
    type="t5",
    from_pretrained="DeepFloyd/t5-v1_1-xxl",
    model_max_length=200,
)
scheduler = dict(
    type="rflow",
)

batch_size = 100
grad_checkpoint = True
lr = 2e-5
grad_clip = 1.0
epochs = 10
seed = 42
dtype = "bf16"
num_workers = 16
log_every = 10
ckpt_every = 500
