"""Draw pictures from prompts with Stable Diffusion XL; gen_img.py does the same with every model.

python sdxl_gen_img.py --ckpt model.safetensors --network_weights my_lora.safetensors --prompt "a cat --d 1"
"""

from functools import partial

from gen_img import OPTIONS as OPTIONS
from gen_img import main
from library.errors import run_script

if __name__ == "__main__":
    run_script(partial(main, family="sdxl"))
