"""Experts make training data out of raw video: detectors, a tracker that links, and words by rule. Needs the extra `video`."""
