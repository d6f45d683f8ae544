"""Train a LoRA or another adapter network for Stable Diffusion XL; train_network.py does the same for every model.

accelerate launch sdxl_train_network.py --config_file my_lora.toml
"""

from functools import partial

from library.errors import run_script
from train_network import train

if __name__ == "__main__":
    run_script(partial(train, family="sdxl"))
