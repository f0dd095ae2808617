"""Open-Sora 1.2, feature extraction: latents and embeddings of the clips of stage 1, computed once.

Training finds them with the same features = dict(folder="features"); run again, it computes what is new or has changed.
Clips fall into buckets anew each epoch: extract_epochs = 10 computes those of ten epochs.

Hardware: one GPU with 16 GB or more for each process: T5 takes 9 GiB in bf16 (estimated), the autoencoder 1 GiB.
Command:  opensora-run opensora-v1-2/misc/extract --data-path clips.csv --nproc 8
"""

pipeline = "extract"
features = dict(folder="features")

dataset = dict(
    type="VariableVideoTextDataset",
    data_path=None,  # --data-path: a table with columns path, text, num_frames, height, width
    transform_name="resize_crop",
)

# resolution: {frames: (share of the fitting clips that is kept, batch size)}; longest clips and largest sizes are tried first
bucket_config = {
    "144p": {1: (1, 475), 51: (1, 51), 102: ((1, 0.33), 27), 204: ((1, 0.1), 13), 408: ((1, 0.1), 6)},
    "256": {1: (0.4, 297), 51: (0.5, 20), 102: ((0.5, 0.33), 10), 204: ((0.5, 0.1), 5), 408: ((0.5, 0.1), 2)},
    "240p": {1: (0.3, 297), 51: (0.4, 20), 102: ((0.4, 0.33), 10), 204: ((0.4, 0.1), 5), 408: ((0.4, 0.1), 2)},
    "360p": {1: (0.2, 141), 51: (0.15, 8), 102: ((0.15, 0.33), 4), 204: ((0.15, 0.1), 2), 408: ((0.15, 0.1), 1)},
    "512": {1: (0.1, 141)},
    "480p": {1: (0.1, 89)},
    "720p": {1: (0.05, 36)},
    "1024": {1: (0.05, 36)},
    "1080p": {1: (0.1, 5)},
    "2048": {1: (0.1, 5)},
}

vae = dict(
    type="OpenSoraVAE_V1_2",
    from_pretrained="hpcai-tech/OpenSora-VAE-v1.2",
    micro_frame_size=17,
    micro_batch_size=32,
)
text_encoder = dict(
    type="t5",
    from_pretrained="DeepFloyd/t5-v1_1-xxl",
    model_max_length=300,
)
seed = 42
dtype = "bf16"
num_workers = 8
