#!/usr/bin/env bash
# Train a LoRA: edit the values below, save, and run   bash train.sh
# 训练 LoRA：改好下面的变量，保存，运行   bash train.sh
#
# Empty ("") is not given; switches are 1 (on) or 0 (off). Relative paths start at the folder of this file.
# 留空 ("") 表示不设置；开关填 1（开）或 0（关）。相对路径从本文件所在的文件夹算起。
# Flags behind the command go before the values here: bash train.sh --network_dim 16
# 命令后面还可以加参数，以命令行为准：bash train.sh --network_dim 16

# --- base model 底模 ---
pretrained_model="models/sd15.safetensors"  # a file, or a folder in diffusers layout 文件或 diffusers 文件夹
is_v2_model=0                # 1: Stable Diffusion 2.x 底模是 SD 2.x 时填 1
parameterization=0           # 1: v prediction, as SD 2.x for 768 pixels 768 像素的 SD 2.x 填 1（v 预测）
vae=""                       # another VAE than the model's own 另用一个 VAE
clip_skip=""                 # 2 for an anime base that wants it 二次元底模常用 2

# --- pictures 训练集 ---
train_data_dir="train"       # holds folders such as 10_yabin 里面是 10_yabin 这样的文件夹
reg_data_dir=""              # regularisation pictures, laid out alike 正则化图，结构相同
caption_extension=".txt"     # captions 打标文件: 001.png -> 001.txt
shuffle_caption=1            # a new order of tags each time 每次打乱标签
keep_tokens=1                # but so many at the start stay 最前面这么多个标签不动
max_token_length=""          # 150 or 225 for captions above 75 tokens 标签超过 75 个 token 时填 150 或 225
resolution="512,512"         # width,height 宽,高
enable_bucket=1              # keep the shape of pictures 分桶，保留长宽比
min_bucket_reso=256
max_bucket_reso=1024
cache_latents=1              # run the VAE once, not every step 只跑一次 VAE
persistent_data_loader_workers=0  # 1: keep the loading processes, takes memory 保留加载进程，占内存

# --- network 网络 ---
network_module="networks.lora"
network_weights=""           # a LoRA to go on from 在已有的 LoRA 上继续
network_dim=32               # rank; a larger one makes a larger file 秩，越大文件越大
network_alpha=16             # the change is scaled by alpha / dim 缩放为 alpha / dim
conv_dim=""                  # with networks.lora: LoCon, for example 8 填了就是 LoCon，例如 8
conv_alpha=""                # for example 4 例如 4
algo=""                      # of lycoris.kohya: loha, lokr, ... 网络模块为 lycoris.kohya 时填
dropout=""                   # for example 0.1 例如 0.1
network_args=()              # more: ("loraplus_lr_ratio=4") 其他参数
train_unet_only=0            # leave the text encoder alone 不训练文本编码器
train_text_encoder_only=0    # leave the U-Net alone 不训练 U-Net

# --- learning 学习 ---
optimizer_type="AdamW8bit"
optimizer_args=()            # ("weight_decay=0.01" "betas=0.9,0.99")
lr="1e-4"                    # counts where the next two are empty 下面两项留空时才用
unet_lr="1e-4"
text_encoder_lr="5e-5"
lr_scheduler="cosine"        # constant, cosine, cosine_with_restarts, ...
lr_warmup_steps=0            # a number, or a share: 0.05 步数，或占总步数的比例
lr_restart_cycles=1          # for cosine_with_restarts 重启次数
batch_size=2
max_train_epochs=10
noise_offset=""              # 0.03 to 0.1 helps with very dark and bright pictures 有助于极暗、极亮的画面
min_snr_gamma=""             # 5 evens out the timesteps 5 可平衡各时间步的损失
seed=42                      # the same seed repeats the run 相同种子可复现

# --- memory and speed 显存与速度 ---
mixed_precision="bf16"       # "fp16" before the RTX 30 series, "no" without a GPU 30 系以前用 "fp16"，没有显卡用 "no"
gradient_checkpointing=0     # 1: less memory, more time 省显存，变慢
lowram=0

# --- files 输出 ---
output_dir="output"
output_name="my_lora"        # output/my_lora.safetensors
save_model_as="safetensors"
save_precision="fp16"
save_every_n_epochs=2
save_state=0                 # with each file a state to resume from 同时保存可继续训练的状态
resume=""                    # such a state: output/my_lora-000002-state 从该状态继续

# --- previews 预览图 ---
sample_prompts="config_examples/sample_prompts.txt"  # one prompt a line 每行一条提示词
sample_every_n_epochs=2

# --- curves 曲线 ---
logging_dir="logs"
log_with=""                  # tensorboard, wandb or all; empty: tensorboard 留空为 tensorboard
wandb_api_key=""
log_tracker_name=""

# --- GPUs 显卡 ---
multi_gpu=0                  # 1: train on several 多卡训练
num_processes=2              # how many, with multi_gpu=1 多卡时的显卡数量
gpu_ids=""                   # which, counted from 0: "1" or "0,2" 用哪几块，从 0 数起

# ----------------------------------------------------------------------------------------------------------------
# The rest needs no editing. 以下无需修改。
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
. tools/launch.sh

option pretrained_model_name_or_path "$pretrained_model"
switch v2 "$is_v2_model"
switch v_parameterization "$parameterization"
option vae "$vae"
option clip_skip "$clip_skip"

option train_data_dir "$train_data_dir"
option reg_data_dir "$reg_data_dir"
option caption_extension "$caption_extension"
switch shuffle_caption "$shuffle_caption"
option keep_tokens "$keep_tokens"
option max_token_length "$max_token_length"
option resolution "$resolution"
switch enable_bucket "$enable_bucket"
option min_bucket_reso "$min_bucket_reso"
option max_bucket_reso "$max_bucket_reso"
switch cache_latents "$cache_latents"
switch persistent_data_loader_workers "$persistent_data_loader_workers"

for name in conv_dim conv_alpha algo; do
    [ -z "${!name}" ] || network_args+=("$name=${!name}")
done
option network_module "$network_module"
option network_weights "$network_weights"
option network_dim "$network_dim"
option network_alpha "$network_alpha"
option network_dropout "$dropout"
# The odd expansion is for macOS's bash 3.2, to which an empty array is an unset variable.
option network_args ${network_args[@]+"${network_args[@]}"}
switch network_train_unet_only "$train_unet_only"
switch network_train_text_encoder_only "$train_text_encoder_only"

option optimizer_type "$optimizer_type"
option optimizer_args ${optimizer_args[@]+"${optimizer_args[@]}"}
option learning_rate "$lr"
option unet_lr "$unet_lr"
option text_encoder_lr "$text_encoder_lr"
option lr_scheduler "$lr_scheduler"
option lr_warmup_steps "$lr_warmup_steps"
option lr_scheduler_num_cycles "$lr_restart_cycles"
option train_batch_size "$batch_size"
option max_train_epochs "$max_train_epochs"
option noise_offset "$noise_offset"
option min_snr_gamma "$min_snr_gamma"
option seed "$seed"

option mixed_precision "$mixed_precision"
switch gradient_checkpointing "$gradient_checkpointing"
switch lowram "$lowram"

option output_dir "$output_dir"
option output_name "$output_name"
option save_model_as "$save_model_as"
option save_precision "$save_precision"
option save_every_n_epochs "$save_every_n_epochs"
switch save_state "$save_state"
option resume "$resume"

option sample_prompts "$sample_prompts"
option sample_every_n_epochs "$sample_every_n_epochs"

option logging_dir "$logging_dir"
option log_with "$log_with"
option wandb_api_key "$wandb_api_key"
option log_tracker_name "$log_tracker_name"

launch "$@"
