"""Train a PixArt-1B/2 on captioned images of 2048x2048.

The weights it starts from are one's own, grown from PixArt-Sigma, say: see opensora convert --help.

Hardware: GPUs with 80 GB. Model, optimizer and activations take about 37 GiB (estimated, in bf16), T5 9 GiB.
Command:  opensora-run pixart/train/1x2048x2048 --data-path images.csv --nproc 8
"""

dataset = dict(
    type="VideoTextDataset",
    data_path=None,  # --data-path: a table with columns path and text
    num_frames=1,
    frame_interval=3,
    image_size=(2048, 2048),
)

model = dict(
    type="PixArt-1B/2",
    space_scale=4,
    no_temporal_pos_emb=True,
    from_pretrained="PixArt-1B-2.pth",
)
vae = dict(
    type="VideoAutoencoderKL",
    from_pretrained="PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
    subfolder="vae",
)
text_encoder = dict(
    type="t5",
    from_pretrained="DeepFloyd/t5-v1_1-xxl",
    model_max_length=300,
)
scheduler = dict(
    type="iddpm",
)

batch_size = 4
grad_checkpoint = True
lr = 2e-5
grad_clip = 1.0
epochs = 1000
seed = 42
dtype = "bf16"
num_workers = 4
log_every = 10
ckpt_every = 1000
