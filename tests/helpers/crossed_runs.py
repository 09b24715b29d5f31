"""A summary with what each model reaches at each hospital."""

import copy

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


def elsewhere(kind):
    """Return a summary in which models of a kind that hospitals keep were tested elsewhere too."""
    summary = copy.deepcopy(SUMMARY)
    del summary["test"]["own"]
    summary["test"][kind] = {
        "north": {
            "auc": 0.95,
            "sites": {"north": {"auc": 0.94}, "south": {"auc": 0.65}, "west": {"auc": 0.55}},
        },
        # It could not be sent, and has no figure at home.
        "south": {"loss": 1.0},
        # Nobody else answered.
        "west": {"auc": 0.7, "sites": {"west": {"auc": 0.7}}},
    }
    return summary
