"""The methods by name. Each is a dataclass of settings with `build(weights) -> Algorithm`, in a file of its
own.

A method of your own needs no entry: name it as `my_package.my_module:MyMethod`.
"""

ALGORITHMS: dict[str, str] = {
    "ddpo": "mmalign.algorithms.ddpo:DDPO",
    "diffusion_nft": "mmalign.algorithms.diffusion_nft:DiffusionNFT",
    "draft": "mmalign.algorithms.draft:DRaFT",
    "flow_grpo": "mmalign.algorithms.flow_grpo:FlowGRPO",
    "flow_grpo_fast": "mmalign.algorithms.flow_grpo_fast:FlowGRPOFast",
    "refl": "mmalign.algorithms.refl:ReFL",
    "srpo": "mmalign.algorithms.srpo:SRPO",
}
