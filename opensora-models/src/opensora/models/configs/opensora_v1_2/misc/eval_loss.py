"""Open-Sora 1.2, evaluation of the loss: of each bucket at 10 timesteps, on all clips that it has room for.

The table is logged, and losses.json in the run folder has its numbers. --num_clips 200 measures so many clips of each bucket;
--start_index and --end_index choose resolutions, so that several runs can share the work.

Hardware: one GPU with 24 GB for each process: T5 takes 9 GiB in bf16, STDiT3 2 GiB (estimated).
Command:  opensora-run opensora-v1-2/misc/eval_loss --data-path clips.csv --ckpt-path outputs/003-STDiT3-XL-2 --nproc 8
"""

pipeline = "eval-loss"
num_eval_timesteps = 10

dataset = dict(
    type="VariableVideoTextDataset",
    data_path=None,  # --data-path: a table with columns path, text, num_frames, height, width
    transform_name="resize_crop",
)

# resolution: {frames: (share of clips, batch size)}; here each bucket is measured by itself, whatever the share
bucket_config = {
    "144p": {1: (1, 100), 51: (1, 30), 102: (1, 20), 204: (1, 8), 408: (1, 4)},
    "240p": {1: (1, 100), 51: (1, 24), 102: (1, 12), 204: (1, 4), 408: (1, 2)},
    "360p": {1: (1, 60), 51: (1, 12), 102: (1, 6), 204: (1, 2), 408: (1, 1)},
    "480p": {1: (1, 40), 51: (1, 6), 102: (1, 3), 204: (1, 1)},
    "720p": {1: (1, 20), 51: (1, 2), 102: (1, 1)},
    "1080p": {1: (1, 10)},
    "2048": {1: (1, 5)},
}

model = dict(
    type="STDiT3-XL/2",
    from_pretrained=None,  # --ckpt-path: a run folder, a file or a hub id
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
scheduler = dict(type="rflow")
seed = 42
dtype = "bf16"
num_workers = 8
