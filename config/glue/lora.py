# The 2024 pipeline's LoRA script, which Teaching Tiny Minds used: rank 8 on queries and values, the head in
# full, the epoch of least validation loss, no early stopping.
#   python -m tools.finetune config/glue/lora.py --ckpt=out/distilledgpt_44m --data=glue_filtered
tasks = ["cola", "sst2", "mrpc", "qqp", "mnli", "qnli", "rte", "boolq", "multirc", "wsc"]
lora_rank = 8
lora_alpha = 16.0
lora_dropout = 0.1
formats = "lora"
select = "loss"
learning_rate = 3e-4
warmup_share = 0.06
warmup_from_0 = True  # as Hugging Face's
batch_size = 64
epochs = 32
patience = 0
seeds = ["42"]
