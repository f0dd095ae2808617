"""Sample an image of 2560x1536 with PixArt-Sigma's published 2K weights.

Without key and value compression, PixArt-Sigma is a PixArt-XL/2 with longer text and another position scale.

Hardware: one GPU with 16 GB: T5 takes 9 GiB in bf16 and is released once the prompts are encoded, the model 1.1 GiB.
Command:  opensora-run pixart/inference/1x2048MS
"""

image_size = (2560, 1536)
num_frames = 1
fps = 1

model = dict(
    type="PixArt-XL/2",
    from_pretrained="PixArt-Sigma-XL-2-2K-MS.pth",
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
