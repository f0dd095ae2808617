"""Train a DiT-XL/2 on captioned videos: 16 frames of 256x256, starting from the published ImageNet weights.

Attention runs over all 16 x 256 tokens at once. What the image weights lack (caption embedder) starts anew, hence partial.

Hardware: GPUs with 24 GB. Model, optimizer and activations take about 15 GiB (estimated, in bf16), text encoder
          little.
Command:  opensora-run dit/train/16x256x256 --data-path clips.csv --nproc 8
"""

dataset = dict(
    type="VideoTextDataset",
    data_path=None,  # --data-path: a table with columns path and text
    num_frames=16,
    frame_interval=3,
    image_size=(256, 256),
)

model = dict(
    type="DiT-XL/2",
    from_pretrained="DiT-XL-2-256x256.pt",
    partial=True,
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

batch_size = 8
grad_checkpoint = True
lr = 2e-5
grad_clip = 1.0
epochs = 1000
seed = 42
dtype = "bf16"
num_workers = 4
log_every = 10
ckpt_every = 1000
