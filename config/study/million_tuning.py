# What config/study/million.py's recipes were chosen by: validation loss alone, with seeds that it does not
# report. Rate, weight decay, dropout and optimizer, for the student's size and for the teachers'.
#   python prepare.py --input_dir=babylm --bos=line --vocab_size=4096 --train_fraction=0.05 \
#       --data_dir=data/million
#   python -m tools.study config/study/million_tuning.py --seeds=11
_student = "config/llama_16m.py --n_layer=4 --n_head=4 --n_embd=128 --intermediate_size=384"
_large = "config/llama_16m.py --n_layer=4 --n_head=4 --n_embd=192 --intermediate_size=512"
_muon = "--optimizer=muon"
runs = [
    f"wd01 {_student}",
    f"wd2 {_student} --weight_decay=2",
    f"muon-wd2 {_student} {_muon} --weight_decay=2",
    f"lr3 {_student} --learning_rate=3e-3",
    f"muon-lr3-wd1 {_student} {_muon} --learning_rate=3e-3 --weight_decay=1",
    f"large-wd01 {_large}",
    f"large-muon-lr3-wd1 {_large} {_muon} --learning_rate=3e-3 --weight_decay=1",
    f"large-muon-lr3-wd2 {_large} {_muon} --learning_rate=3e-3 --weight_decay=2",
    f"large-muon-lr3-wd1-drop {_large} {_muon} --learning_rate=3e-3 --weight_decay=1 --dropout=0.1",
]
settings = ["--epochs=8", "--batch_size=32", "--learning_rate=1e-3", "--warmup_iters=100",
            "--eval_interval=0", "--eval_chunks=2048", "--log_interval=50"]
data_dir = "data/million"
out_dir = "out/million_tuning"
