"""Train a DiT-XL/2 on captioned images of 256x256, from noise.

The caption reaches the model as one CLIP vector.

Hardware: GPUs with 80 GB. Model, optimizer and activations take about 66 GiB (estimated, in bf16), text encoder
          little.
Command:  opensora-run dit/train/1x256x256 --data-path images.csv --nproc 8
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
    type="DiT-XL/2",
    from_pretrained=None,  # --ckpt-path: a run folder, a file or a hub id
    no_temporal_pos_emb=True,
)
vae = dict(
    type="VideoAutoencoderKL",
    from_pretrained="stabilityai/sd-vae-ft-ema",
)
text_encoder = dict(
    type="clip",
    from_pretrained="openai/clip-vit-base-patch32",
    model_max_length=77,
)
scheduler = dict(
    type="iddpm",
)

batch_size = 128
grad_checkpoint = False
lr = 1e-4
grad_clip = 1.0
epochs = 1000
seed = 42
dtype = "bf16"
num_workers = 4
log_every = 10
ckpt_every = 1000
