"""Sample an image of 2560x1536 with a PixArt-1B/2 that pixart/train/1x2048x2048.py has trained.

There are no published weights of this model: PixArt-1B-2.pth is one's own file.

Hardware: one GPU with 16 GB: T5 takes 9 GiB in bf16 and is released once the prompts are encoded, the model 3.0 GiB.
Command:  opensora-run pixart/inference/1x20481B
"""

image_size = (2560, 1536)
num_frames = 1
fps = 1

model = dict(
    type="PixArt-1B/2",
    from_pretrained="PixArt-1B-2.pth",
    space_scale=4,
    no_temporal_pos_emb=True,
    base_size=256,
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
    type="dpm-solver",
    num_sampling_steps=14,
    cfg_scale=4.5,
)

prompt_path = "prompts/t2i_sigma.txt"
batch_size = 1
seed = 42
dtype = "bf16"
