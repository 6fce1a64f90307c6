"""Hypothesis profiles: `ci` draws the same examples every time, `dev` searches for new ones and shrinks what fails.

`ci` is the default; choose with the environment variable HYPOTHESIS_PROFILE.
"""

import os

from hypothesis import Phase, settings

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    database=None,
    # Arrays come from a drawn seed, so shrinking says little; and the tests that must fail would spend a minute on it.
    phases=(Phase.explicit, Phase.generate),
)
settings.register_profile("dev", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
