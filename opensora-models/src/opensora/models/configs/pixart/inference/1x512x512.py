"""Sample images of 512x512 with PixArt-alpha's published weights.

Hardware: one GPU with 16 GB: T5 takes 9 GiB in bf16 and is released once the prompts are encoded, the model 1.1 GiB.
Command:  opensora-run pixart/inference/1x512x512
"""

image_size = (512, 512)
num_frames = 1
fps = 1

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
    type="dpm-solver",
    num_sampling_steps=20,
    cfg_scale=7,
)

prompt = [
    "a lighthouse on a cliff, oil painting",
    "a red fox asleep in fresh snow",
    "an old typewriter on a wooden desk, morning light",
]
batch_size = 2
seed = 42
dtype = "bf16"
