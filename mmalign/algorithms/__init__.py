"""The methods by name. Each is a dataclass of settings with `build(weights) -> Algorithm`, in a file of its
own.

A method of your own needs no entry: name it as `my_package.my_module:MyMethod`.
"""

ALGORITHMS: dict[str, str] = {
    "dance_grpo": "mmalign.algorithms.dance_grpo:DanceGRPO",
    "diffusion_nft": "mmalign.algorithms.diffusion_nft:DiffusionNFT",
    "flow_dppo": "mmalign.algorithms.flow_dppo:FlowDPPO",
    "flow_grpo": "mmalign.algorithms.flow_grpo:FlowGRPO",
    "flow_grpo_fast": "mmalign.algorithms.flow_grpo_fast:FlowGRPOFast",
    "gardo": "mmalign.algorithms.gardo:GARDO",
    "grpo_guard": "mmalign.algorithms.grpo_guard:GRPOGuard",
    "mix_grpo": "mmalign.algorithms.mix_grpo:MixGRPO",
}
