"""A summary with what each model reaches at each hospital."""

SITES = ["north", "south", "west"]
SUMMARY = {
    "test": {
        "federated": {"auc": 0.8},
        "sites": {"north": {"auc": 0.8}, "south": {"auc": 0.7}, "west": {"loss": 1.0}},
        "local": {
            "north": {
                "auc": 0.9,
                "all": {"auc": 0.8},
                "sites": {"north": {"auc": 0.9}, "south": {"auc": 0.5}, "west": {}},
            },
            "south": {"auc": 0.6, "all": {}, "sites": {"south": {"auc": 0.6}}},
            "west": {"all": {}, "sites": {}},
        },
        "own": {"north": {"auc": 0.85}},
        "pooled": {"auc": 0.8, "sites": {"north": {"auc": 0.82}, "south": {"auc": 0.71}}},
    }
}
