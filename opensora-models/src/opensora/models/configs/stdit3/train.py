"""Train an STDiT3-XL/2 on captioned videos, at the settings of Open-Sora 1.2's first stage: 2 seconds of 240p landscape.

To start from an image model instead of noise, give a PixArt-Sigma file with --ckpt-path and --model.partial True: its blocks
become the spatial ones.

Hardware: GPUs with 80 GB. Open-Sora 1.2 took about 35,000 GPU hours (H100) over all its stages.
Command:  opensora-run stdit3/train.py --data-path clips.csv --nproc 8
"""

dataset = dict(
    type="VideoTextDataset",
    data_path="clips.csv",  # columns path and text
    num_frames=51,
    image_size=(240, 426),
    transform_name="resize_crop",
)

model = dict(
    type="STDiT3-XL/2",
    from_pretrained=None,
    qk_norm=True,
)
vae = dict(
    type="VideoAutoencoderKL",
    from_pretrained="PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
    subfolder="vae",
    micro_batch_size=4,
)
text_encoder = dict(
    type="t5",
    from_pretrained="DeepFloyd/t5-v1_1-xxl",
    model_max_length=300,
)
scheduler = dict(
    type="rflow",
    use_timestep_transform=True,
    sample_method="logit-normal",
)

# Share of clips of which some frames are given, so that the model learns to animate images and to extend videos.
mask_ratios = dict(
    random=0.05,
    intepolate=0.005,
    quarter_random=0.005,
    quarter_head=0.005,
    quarter_tail=0.005,
    quarter_head_tail=0.005,
    image_random=0.025,
    image_head=0.05,
    image_tail=0.025,
    image_head_tail=0.025,
)

batch_size = 2
grad_checkpoint = True
lr = 1e-4
warmup_steps = 1000
grad_clip = 1.0
adam_eps = 1e-15
ema_decay = 0.99
epochs = 1000
seed = 42
dtype = "bf16"
num_workers = 8
log_every = 10
ckpt_every = 200
