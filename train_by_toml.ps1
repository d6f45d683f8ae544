# Train what a TOML file says: edit the values below, save, and run   .\train_by_toml.ps1
# 按 TOML 文件训练：改好下面的变量，保存，运行   .\train_by_toml.ps1
#
# Empty ("") is not given. Relative paths, in the TOML too, start at the folder of this file.
# 留空 ("") 表示不设置。相对路径（包括 TOML 里的）从本文件所在的文件夹算起。
# Flags behind the command go before the TOML: .\train_by_toml.ps1 --network_dim 16
# 命令后面还可以加参数，以命令行为准：.\train_by_toml.ps1 --network_dim 16

$config_file = "config_examples/lora_sd15.toml"  # more examples are beside it 旁边还有别的示例
$sample_prompts = ""           # prompts for previews, instead of the TOML's 预览图提示词，代替 TOML 里的

# --- GPUs 显卡 ---
$multi_gpu = 0                 # 1: train on several 多卡训练
$num_processes = 2             # how many, with multi_gpu=1 多卡时的显卡数量
$gpu_ids = ""                  # which, counted from 0: "1" or "0,2" 用哪几块，从 0 数起

$utf8 = 1                      # 0: Python follows the system's encoding 填 0 则使用系统编码

# ----------------------------------------------------------------------------------------------------------------
# The rest needs no editing. 以下无需修改。
. (Join-Path $PSScriptRoot "tools\launch.ps1")

$env:PYTHONUTF8 = "$utf8"
Add-Option config_file $config_file
Add-Option sample_prompts $sample_prompts

Start-Training $args
exit $LASTEXITCODE
