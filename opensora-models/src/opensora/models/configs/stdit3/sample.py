"""Sample videos with an STDiT3-XL/2, at the settings of Open-Sora 1.2: 2 seconds of 240p landscape.

The model is one that stdit3/train.py has trained, on latents of the image autoencoder. (The published 1.2 weights work on
latents of another one, which also compresses time.)

Hardware: one GPU with 24 GB or more. The first run downloads T5 (19 GB) and the autoencoder.
Command:  opensora-run stdit3/sample.py --ckpt-path outputs/000-STDiT3-XL-2 --prompt "a wave rolls onto a beach"
"""

resolution = "240p"
aspect_ratio = "9:16"  # height : width
num_frames = 51
fps = 24
save_fps = 24

model = dict(
    type="STDiT3-XL/2",
    from_pretrained=None,  # --ckpt-path: a run folder, a file or a hub id
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
    num_sampling_steps=30,
    cfg_scale=7.0,
)

prompt = "a wave rolls onto a beach at sunset"
aes = 6.5  # adds "aesthetic score: 6.5." to the prompt, as in the training captions
batch_size = 1
seed = 42
dtype = "bf16"
