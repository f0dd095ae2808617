"""Sample 64 frames of 512x512 with an STDiT-XL/2 that opensora/train/64x512x512.py has trained.

Time is scaled by 2/3. There are no published weights of this length.

Hardware: one GPU with 16 GB: T5 takes 9 GiB in bf16 and is released once the prompts are encoded, the model 1.4 GiB.
Command:  opensora-run opensora/inference/64x512x512
"""

image_size = (512, 512)
num_frames = 64
fps = 12

model = dict(
    type="STDiT-XL/2",
    space_scale=1,
    time_scale=2 / 3,
    from_pretrained=None,  # --ckpt-path: a run folder, a file or a hub id
)
vae = dict(
    type="VideoAutoencoderKL",
    from_pretrained="stabilityai/sd-vae-ft-ema",
    micro_batch_size=128,
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
batch_size = 1
seed = 42
dtype = "bf16"
