"""DoRA (arXiv:2402.09353), as `networks.lora` with dora=True has it: see `networks/decomposed.py`."""

from library.families.base import AdapterTarget
from networks import lora
from networks.base import AdapterNetwork
from networks.dora_arguments import check_arguments as check_arguments
from networks.dora_arguments import needs_base_weights as needs_base_weights
from networks.dora_arguments import wants_convolutions as wants_convolutions
from networks.dora_arguments import wants_norms as wants_norms
from networks.dora_arguments import with_dora


def create_network(
    targets: list[AdapterTarget],
    network_dim: int | None,
    network_alpha: int | float | None,
    neuron_dropout: float | None = None,
    **network_args: str,
) -> AdapterNetwork:
    """A DoRA network on the targets, whose weights must be there; `network_args` are those of networks.lora."""
    return lora.create_network(targets, network_dim, network_alpha, neuron_dropout, **with_dora(network_args))


create_network_from_weights = lora.create_network_from_weights
