# BabyLlama-2's fine-tuning (its table 4): settings for each task, no early stopping, seed 12. MNLI's model is scored on mnli-mm too.
#   python -m tools.finetune config/glue/babyllama2.py --ckpt=out/babyllama2 --data=glue_filtered
# The paper's scores (its table 5, two runs): CoLA 34.9 and 31.4, SST-2 85.8 and 83.5, RTE 54.7 and 61.2, WSC 57.7 and 65.4.
per_task = [
    "cola --learning_rate=1e-5 --batch_size=32 --epochs=10 --weight_decay=0.15 --schedule=linear --warmup_iters=600",
    "sst2 --learning_rate=2e-6 --batch_size=24 --epochs=2 --weight_decay=5 --schedule=constant --warmup_iters=200",
    "mrpc --learning_rate=1e-5 --batch_size=1 --epochs=2 --weight_decay=2 --schedule=cosine --warmup_iters=500",
    "qqp --learning_rate=4.5e-6 --batch_size=32 --epochs=6 --weight_decay=2 --schedule=linear --warmup_iters=500",
    "mnli --learning_rate=1e-5 --batch_size=32 --epochs=2 --weight_decay=1 --schedule=linear --warmup_iters=500",
    "qnli --learning_rate=5e-6 --batch_size=32 --epochs=2 --weight_decay=0.3 --schedule=cosine --warmup_iters=200",
    "rte --learning_rate=1e-5 --batch_size=2 --epochs=2 --weight_decay=10 --schedule=cosine --warmup_iters=200",
    "boolq --learning_rate=2e-5 --batch_size=8 --epochs=1 --weight_decay=0.1 --schedule=cosine --warmup_iters=200",
    "multirc --learning_rate=1e-5 --batch_size=8 --epochs=2 --weight_decay=2 --schedule=cosine --warmup_iters=500",
    "wsc --learning_rate=2e-6 --batch_size=1 --epochs=24 --weight_decay=0.4 --schedule=cosine --warmup_iters=500",
]
tasks = ["cola", "sst2", "mrpc", "qqp", "mnli", "qnli", "rte", "boolq", "multirc", "wsc"]
patience = 0
seeds = ["12"]
