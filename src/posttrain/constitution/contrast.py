"""The contrast stage: prompts in, preference pairs out, without a judge (after Yang et al. 2024, RLCD).

For each prompt the policy answers twice: with drawn principles in its system prompt, and without. The first answer is chosen,
the second rejected. That label is an assumption, so no judge is needed. `contrast_pairs.py` does the work.
Left out: whether the principles had an effect, which the evaluation of what is trained on the pairs shows.
"""

from posttrain.constitution.contrast_pairs import make_contrast
from posttrain.stages.contrast import ContrastStage
from posttrain.stages.kind import Result
from posttrain.train.stage import StageContext


def write_contrast(context: StageContext, stage: ContrastStage) -> Result:
    """Answer every prompt with and without principles and write the pairs. Raises DataError for data that cannot be used."""
    return make_contrast(context, stage)
