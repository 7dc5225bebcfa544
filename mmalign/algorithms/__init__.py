"""The methods by name. Each is a dataclass of settings with `build(weights) -> Algorithm`, in a file of its
own.

A method of your own needs no entry: name it as `my_package.my_module:MyMethod`.
"""

ALGORITHMS: dict[str, str] = {
    "awm": "mmalign.algorithms.awm:AWM",
    "branch_grpo": "mmalign.algorithms.branch_grpo:BranchGRPO",
    "claimdiff": "mmalign.algorithms.claimdiff:ClaimDiffRL",
    "crd": "mmalign.algorithms.crd:CRD",
    "dance_grpo": "mmalign.algorithms.dance_grpo:DanceGRPO",
    "ddpo": "mmalign.algorithms.ddpo:DDPO",
    "dense_grpo": "mmalign.algorithms.dense_grpo:DenseGRPO",
    "dgpo": "mmalign.algorithms.dgpo:DGPO",
    "diffusion_dpo": "mmalign.algorithms.diffusion_dpo:DiffusionDPO",
    "diffusion_nft": "mmalign.algorithms.diffusion_nft:DiffusionNFT",
    "distill": "mmalign.algorithms.distill:Distill",
    "dpok": "mmalign.algorithms.dpok:DPOK",
    "draft": "mmalign.algorithms.draft:DRaFT",
    "drpo": "mmalign.algorithms.drpo:DRPO",
    "flow_dppo": "mmalign.algorithms.flow_dppo:FlowDPPO",
    "flow_grpo": "mmalign.algorithms.flow_grpo:FlowGRPO",
    "flow_grpo_fast": "mmalign.algorithms.flow_grpo_fast:FlowGRPOFast",
    "g2rpo": "mmalign.algorithms.g2rpo:G2RPO",
    "gardo": "mmalign.algorithms.gardo:GARDO",
    "grpo": "mmalign.algorithms.grpo:GRPO",
    "grpo_guard": "mmalign.algorithms.grpo_guard:GRPOGuard",
    "igpo": "mmalign.algorithms.igpo:IGPO",
    "lirefl": "mmalign.algorithms.lirefl:LIReFL",
    "mix_grpo": "mmalign.algorithms.mix_grpo:MixGRPO",
    "pow3r": "mmalign.algorithms.pow3r:POW3R",
    "pref_grpo": "mmalign.algorithms.pref_grpo:PrefGRPO",
    "refl": "mmalign.algorithms.refl:ReFL",
    "sage_grpo": "mmalign.algorithms.sage_grpo:SAGEGRPO",
    "sft": "mmalign.algorithms.sft:SFT",
    "srpo": "mmalign.algorithms.srpo:SRPO",
    "tempflow_grpo": "mmalign.algorithms.tempflow_grpo:TempFlowGRPO",
    "trajectory_balance": "mmalign.algorithms.trajectory_balance:TrajectoryBalance",
    "trust_grpo": "mmalign.algorithms.trust_grpo:TrustGRPO",
    "tw_grpo": "mmalign.algorithms.tw_grpo:TWGRPO",
}
