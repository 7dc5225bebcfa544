"""The methods by name. Each is a dataclass of settings with `build(weights) -> Algorithm`, in a file of its
own.

A method of your own needs no entry: name it as `my_package.my_module:MyMethod`.
"""

ALGORITHMS: dict[str, str] = {
    "awm": "mmalign.algorithms.awm:AWM",
    "crd": "mmalign.algorithms.crd:CRD",
    "dgpo": "mmalign.algorithms.dgpo:DGPO",
    "diffusion_dpo": "mmalign.algorithms.diffusion_dpo:DiffusionDPO",
    "diffusion_nft": "mmalign.algorithms.diffusion_nft:DiffusionNFT",
    "distill": "mmalign.algorithms.distill:Distill",
    "flow_grpo": "mmalign.algorithms.flow_grpo:FlowGRPO",
    "flow_grpo_fast": "mmalign.algorithms.flow_grpo_fast:FlowGRPOFast",
    "pref_grpo": "mmalign.algorithms.pref_grpo:PrefGRPO",
    "trajectory_balance": "mmalign.algorithms.trajectory_balance:TrajectoryBalance",
}
