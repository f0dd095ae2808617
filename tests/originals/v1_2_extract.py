"""In the style of Open-Sora 1.2's configs: extraction of features."""

dataset = dict(type="VariableVideoTextDataset", transform_name="resize_crop")
bucket_config = {"240p": {1: (0.3, 297), 51: (0.4, 20)}}

num_workers = 8
num_bucket_build_workers = 16
dtype = "bf16"
seed = 42
outputs = "outputs"
wandb = False

model = dict(
    type="STDiT3-XL/2",
    from_pretrained="pretrained.pth",
    qk_norm=True,
    enable_flash_attn=True,
    enable_layernorm_kernel=True,
)
vae = dict(
    type="OpenSoraVAE_V1_2",
    from_pretrained="pretrained_models/vae-pipeline",
    micro_frame_size=17,
    micro_batch_size=32,
)
text_encoder = dict(type="t5", from_pretrained="DeepFloyd/t5-v1_1-xxl", model_max_length=300, shardformer=True)

save_text_features = True
save_compressed_text_features = True
bin_size = 250
log_time = False
