"""How good images are: FID, sFID, Inception Score, precision and recall, and the networks that they are taken in."""

from vapi_fast._lazy import offers

__all__, __getattr__ = offers(
    __name__,
    {
        "metrics": ["Scores", "frechet_distance", "inception_score", "precision_recall", "score"],
        "inception": ["load_inception"],
        "config": ["EvaluateConfig", "GenevalConfig"],
        "scoring": ["evaluate"],
        "geneval": ["evaluate_geneval"],
    },
)
