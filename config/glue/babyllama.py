# Baby Llama's fine-tuning (its figure 3 and table 2, settings in table 3) by the rules of 2023: validation
# every so many steps, a patience of 10 validations, MNLI-mm trained for itself. A schedule without warm-up
# down to 0, as the pipeline's. The files of 2024 do, too.
#   python -m tools.finetune config/glue/babyllama.py --ckpt=out/babyllama --data=glue_filtered
rules = "2023"
per_task = [
    "cola --learning_rate=4e-5 --epochs=3 --eval_interval=20",
    "sst2 --learning_rate=5e-5 --epochs=6 --eval_interval=200",
    "mrpc --learning_rate=3e-5 --epochs=3 --eval_interval=20",
    "qqp --learning_rate=4e-5 --epochs=10 --eval_interval=1000",
    "mnli --learning_rate=5e-5 --epochs=6 --eval_interval=200",
    "mnli-mm --learning_rate=5e-5 --epochs=6 --eval_interval=200",
    "qnli --learning_rate=5e-5 --epochs=6 --eval_interval=200",
    "rte --learning_rate=5e-5 --epochs=6 --eval_interval=200",
    "boolq --learning_rate=3e-4 --epochs=10 --batch_size=16 --eval_interval=10",
    "multirc --learning_rate=1e-4 --epochs=7 --eval_interval=1000",
    "wsc --learning_rate=5e-7 --epochs=10 --batch_size=1 --eval_interval=2000 --patience=1000",
]
# the paper's seed for multirc alone is 42: --tasks=multirc --seeds=42
tasks = ["cola", "sst2", "mrpc", "qqp", "mnli", "mnli-mm", "qnli", "rte", "boolq", "multirc", "wsc"]
seeds = ["12"]
