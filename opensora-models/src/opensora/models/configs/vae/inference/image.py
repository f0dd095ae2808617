"""Rebuild images of 256x256 with Open-Sora 1.2's published autoencoder, and measure how well.

Writes originals and reconstructions side by side, and PSNR, SSIM and LPIPS.

Hardware: one GPU with 16 GB, or a CPU and patience.
Command:  opensora-run vae/inference/image --data-path images.csv
"""

pipeline = "sample-vae"

dataset = dict(
    type="VideoTextDataset",
    data_path=None,  # --data-path: a table with a column path
    num_frames=1,
    image_size=(256, 256),
)

model = dict(
    type="OpenSoraVAE_V1_2",
    from_pretrained="hpcai-tech/OpenSora-VAE-v1.2",
    micro_frame_size=None,
    micro_batch_size=4,
    cal_loss=True,
)

perceptual_loss_weight = 0.1
kl_loss_weight = 1e-6
cal_stats = True
log_stats_every = 100
num_samples = 100
batch_size = 1
seed = 42
dtype = "bf16"
num_workers = 4
