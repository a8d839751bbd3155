"""Published scores, in % where nothing else is said, beside those of 2025 and 2026 that tools/submit.py has;
and those of chance."""

CHANCE = {"BLiMP": 50.0, "supplement": 50.0, "EWoK": 50.0, "COMPS": 50.0, "entity tracking": 20.0,
          "GlobalPIQA": 37.5}

# the README of the pipeline of 2024
BASELINES_2024 = {
    "BabyLlama, 10M": {"BLiMP": 69.8, "supplement": 59.5, "EWoK": 50.7, "GLUE": 63.3},
    "LTG-BERT, 10M": {"BLiMP": 60.6, "supplement": 60.8, "EWoK": 48.9, "GLUE": 60.3},
    "BabyLlama, 100M": {"BLiMP": 73.1, "supplement": 60.6, "EWoK": 52.1, "GLUE": 69.0},
    "LTG-BERT, 100M": {"BLiMP": 69.2, "supplement": 66.5, "EWoK": 51.9, "GLUE": 68.4},
}

# Baby Llama's table 4, age of acquisition: mean error in months over all words, nouns, predicates, and
# function words
AOA_MONTHS = {"Baby Llama": (2.06, 1.99, 1.84, 2.63), "OPT-125M": (2.03, 1.98, 1.81, 2.57),
              "RoBERTa": (2.06, 1.99, 1.85, 2.65), "T5": (2.04, 1.97, 1.82, 2.64)}

# rules -> model -> task; MRPC and QQP by F1, CoLA by Matthews' correlation, the others by accuracy
GLUE = {
    "2024": {
        "BabyLlama, 10M": {
            "boolq": 65.0, "cola": 2.2, "mnli": 72.4, "mnli-mm": 74.2, "mrpc": 82.0, "multirc": 60.1,
            "qnli": 82.8, "qqp": 83.6, "rte": 49.6, "sst2": 86.2, "wsc": 38.5},
        "BabyLlama, 100M": {
            "boolq": 66.1, "cola": 37.3, "mnli": 75.6, "mnli-mm": 76.2, "mrpc": 86.8, "multirc": 62.1,
            "qnli": 83.1, "qqp": 84.5, "rte": 60.4, "sst2": 88.3, "wsc": 38.5}},
    "2026": {
        "GPT-2, 10M": {"boolq": 67.71, "mnli": 49.84, "mrpc": 81.37, "multirc": 65.76, "qqp": 61.67,
                       "rte": 56.83, "wsc": 63.46},
        "GPT-2, 100M": {"boolq": 69.66, "mnli": 60.76, "mrpc": 85.34, "multirc": 65.92, "qqp": 71.56,
                        "rte": 57.55, "wsc": 63.46}},
}
