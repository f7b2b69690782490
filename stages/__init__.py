"""The stages, in the order of the chain: one file each. `pipeline` knows them by these names only."""

STAGES: dict[str, str] = {
    "pretrain": "stages.pretrain:Pretrain",
    "sft": "stages.sft:Sft",
    "reward": "stages.reward:Reward",
    "ppo": "stages.ppo:Ppo",
    "rejection": "stages.rejection:Rejection",
    "dpo": "stages.dpo:Dpo",
    "evaluate": "stages.evaluate:Evaluate",
}
