"""The methods by name. Each is a dataclass of settings with `build(weights) -> Algorithm`, in a file of its
own.

A method of your own needs no entry: name it as `my_package.my_module:MyMethod`.
"""

ALGORITHMS: dict[str, str] = {
    "awm": "mmalign.algorithms.awm:AWM",
    "branch_grpo": "mmalign.algorithms.branch_grpo:BranchGRPO",
    "crd": "mmalign.algorithms.crd:CRD",
    "dance_grpo": "mmalign.algorithms.dance_grpo:DanceGRPO",
    "ddpo": "mmalign.algorithms.ddpo:DDPO",
    "dense_grpo": "mmalign.algorithms.dense_grpo:DenseGRPO",
    "dgpo": "mmalign.algorithms.dgpo:DGPO",
    "diffusion_dpo": "mmalign.algorithms.diffusion_dpo:DiffusionDPO",
    "diffusion_nft": "mmalign.algorithms.diffusion_nft:DiffusionNFT",
    "distill": "mmalign.algorithms.distill:Distill",
    "draft": "mmalign.algorithms.draft:DRaFT",
    "flow_dppo": "mmalign.algorithms.flow_dppo:FlowDPPO",
    "flow_grpo": "mmalign.algorithms.flow_grpo:FlowGRPO",
    "flow_grpo_fast": "mmalign.algorithms.flow_grpo_fast:FlowGRPOFast",
    "g2rpo": "mmalign.algorithms.g2rpo:G2RPO",
    "gardo": "mmalign.algorithms.gardo:GARDO",
    "grpo_guard": "mmalign.algorithms.grpo_guard:GRPOGuard",
    "mix_grpo": "mmalign.algorithms.mix_grpo:MixGRPO",
    "pref_grpo": "mmalign.algorithms.pref_grpo:PrefGRPO",
    "refl": "mmalign.algorithms.refl:ReFL",
    "sage_grpo": "mmalign.algorithms.sage_grpo:SAGEGRPO",
    "srpo": "mmalign.algorithms.srpo:SRPO",
    "tempflow_grpo": "mmalign.algorithms.tempflow_grpo:TempFlowGRPO",
    "trajectory_balance": "mmalign.algorithms.trajectory_balance:TrajectoryBalance",
}
