"""Sample 16 frames of 512x512 in 10 steps with an STDiT-XL/2 tuned to rectified flow.

The model is one that you have trained, with opensora/train/16x256x256-spee-rflow.py say: there are no published weights.

Hardware: one GPU with 16 GB: T5 takes 9 GiB in bf16 and is released once the prompts are encoded, the model 1.4 GiB.
Command:  opensora-run opensora/inference/16x512x512-rflow
"""

image_size = (512, 512)
num_frames = 16
fps = 8

model = dict(
    type="STDiT-XL/2",
    space_scale=1,
    time_scale=1,
    from_pretrained=None,  # --ckpt-path: a run folder, a file or a hub id
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
    type="rflow",
    num_sampling_steps=10,
    cfg_scale=7,
)

prompt_path = "prompts/t2v_samples.txt"
batch_size = 2
seed = 42
dtype = "bf16"
