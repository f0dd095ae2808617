"""Sample 16 frames of 512x512 with Open-Sora 1.0's published STDiT-XL/2.

Hardware: one GPU with 16 GB: T5 takes 9 GiB in bf16 and is released once the prompts are encoded, the model 1.4 GiB.
Command:  opensora-run opensora/inference/16x512x512
"""

image_size = (512, 512)
num_frames = 16
fps = 8

model = dict(
    type="STDiT-XL/2",
    space_scale=1,
    time_scale=1,
    from_pretrained="OpenSora-v1-HQ-16x512x512.pth",
)
vae = dict(
    type="VideoAutoencoderKL",
    from_pretrained="stabilityai/sd-vae-ft-ema",
    micro_batch_size=2,
)
text_encoder = dict(
    type="t5",
    from_pretrained="DeepFloyd/t5-v1_1-xxl",
    model_max_length=120,
)
scheduler = dict(
    type="iddpm",
    num_sampling_steps=100,
    cfg_scale=7,
)

prompt_path = "prompts/t2v_samples.txt"
batch_size = 2
seed = 42
dtype = "bf16"
