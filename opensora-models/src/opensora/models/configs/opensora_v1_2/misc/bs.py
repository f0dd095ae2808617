"""Open-Sora 1.2, search for batch sizes: STDiT3-XL/2, each bucket as large as keeps to the step time of 12 seconds.

The result is a bucket_config for training, from measured steps on the GPU at hand; needs opensora-accel. Only the images of
240p are searched; a variance above 0 has others searched too. Start it once for each --resolution to search side by side.

Hardware: the GPU that is to be trained on; published for 80 GB.
Command:  opensora-run opensora-v1-2/misc/bs
"""

pipeline = "search-batch-size"

dataset = dict(
    type="VariableVideoTextDataset",  # not read: steps are made of noise
    transform_name="resize_crop",
)

# resolution: {frames: (guess, variance)}; from guess - variance to guess + variance is searched, and 0 keeps the guess
bucket_config = {
    "144p": {1: (475, 0), 51: (51, 0), 102: (27, 0), 204: (13, 0), 408: (6, 0)},
    "240p": {1: (297, 200), 51: (20, 0), 102: (10, 0), 204: (5, 0), 408: (2, 0)},
    "512": {1: (141, 0), 51: (8, 0), 102: (4, 0), 204: (2, 0), 408: (1, 0)},
    "480p": {1: (89, 0), 51: (5, 0), 102: (2, 0), 204: (1, 0)},
    "1024": {1: (36, 0), 51: (1, 0)},
    "1080p": {1: (5, 0)},
    "2048": {1: (5, 0)},
}
base = ("512", "408")  # whose step time is measured where base_step_time is None
base_step_time = 12

model = dict(
    type="STDiT3-XL/2",
    from_pretrained=None,
    qk_norm=True,
)
vae = dict(
    type="OpenSoraVAE_V1_2",
    from_pretrained="hpcai-tech/OpenSora-VAE-v1.2",
    micro_frame_size=17,
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

# share of samples by which of their frames are given instead of noised; the rest is "identity": none
mask_ratios = dict(
    random=0.2,
    intepolate=0.01,
    quarter_random=0.01,
    quarter_head=0.01,
    quarter_tail=0.01,
    quarter_head_tail=0.01,
    image_random=0.05,
    image_head=0.1,
    image_tail=0.05,
    image_head_tail=0.05,
)

grad_checkpoint = True
lr = 2e-4
grad_clip = 1.0
adam_eps = 1e-15
ema_decay = 0.99
seed = 42
dtype = "bf16"
