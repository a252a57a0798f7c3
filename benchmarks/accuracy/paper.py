"""The paper's figures, to compare with those measured here.

Source: arXiv:2411.17686, Tables 2 to 7.
"""

from collections.abc import Mapping

# Table of `suites` to row label to accuracy on ScienceQA and TextVQA.
ABLATIONS: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "ablation-v": {
        "full": (69.5, 58.2),
        "FiCoCo-V": (68.37, 55.46),
        "w/o local redundancy": (67.81, 52.51),
        "w/o task redundancy": (64.67, 48.74),
        "w/o local penalty": (68.12, 53.24),
        "fixed K=0": (67.82, 53.56),
        "fixed K=1": (67.43, 46.97),
        "fixed K=2": (67.21, 51.36),
        "average compression": (67.92, 53.34),
    },
    "ablation-l": {
        "full": (69.5, 58.2),
        "FiCoCo-L": (69.46, 55.72),
        "w/o local redundancy": (69.16, 55.43),
        "w/o task redundancy": (68.22, 55.64),
        "w/o indirect correlation": (68.89, 54.78),
        "w/o direct correlation": (68.45, 55.45),
        "fixed K=0": (68.96, 50.33),
        "fixed K=1": (68.57, 50.11),
        "fixed K=2": (68.32, 50.18),
        "average compression": (68.32, 54.66),
    },
    "sensitivity-v": {
        "full": (69.5, 58.2),
        "epsilon = 0.998": (68.37, 55.46),
        "epsilon = 0.996": (68.33, 53.15),
        "epsilon = 0.994": (68.21, 52.05),
        "epsilon = 0.992": (68.47, 52.29),
        "coefficient = 1": (68.12, 53.24),
        "coefficient = 2": (68.37, 55.46),
        "coefficient = 3": (68.21, 55.04),
        "coefficient = 4": (68.11, 55.49),
    },
    "sensitivity-l": {
        "full": (69.5, 58.2),
        "epsilon = 0.998": (69.46, 55.72),
        "epsilon = 0.996": (69.51, 55.62),
        "epsilon = 0.994": (69.32, 55.42),
        "epsilon = 0.992": (69.36, 55.14),
    },
}
