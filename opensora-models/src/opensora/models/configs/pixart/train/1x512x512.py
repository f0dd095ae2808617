"""Tune PixArt-alpha on captioned images of 512x512.

Hardware: GPUs with 40 GB. Model, optimizer and activations take about 14 GiB (estimated, in bf16), T5 9 GiB.
Command:  opensora-run pixart/train/1x512x512 --data-path images.csv --nproc 8
"""

dataset = dict(
    type="VideoTextDataset",
    data_path=None,  # --data-path: a table with columns path and text
    num_frames=1,
    frame_interval=3,
    image_size=(512, 512),
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
)
text_encoder = dict(
    type="t5",
    from_pretrained="DeepFloyd/t5-v1_1-xxl",
    model_max_length=120,
)
scheduler = dict(
    type="iddpm",
)

batch_size = 32
grad_checkpoint = True
lr = 2e-5
grad_clip = 1.0
epochs = 1000
seed = 42
dtype = "bf16"
num_workers = 4
log_every = 10
ckpt_every = 1000
