"""Records in a code: worked examples, all dtypes, what is lost, what a stranger may send."""

import ml_dtypes
import numpy as np
import pytest
