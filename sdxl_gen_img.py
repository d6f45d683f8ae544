"""Draw pictures from prompts with Stable Diffusion XL; gen_img.py does the same with every model.

python sdxl_gen_img.py --ckpt model.safetensors --network_weights my_lora.safetensors --prompt "a cat --d 1"
"""

from functools import partial

import gen_img
from library.errors import run_script

OPTIONS = gen_img.OPTIONS

if __name__ == "__main__":
    run_script(partial(gen_img.main, family="sdxl"))
