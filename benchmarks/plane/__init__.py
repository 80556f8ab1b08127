"""The parts of paper_2d.py: tasks, the exact law (truth), samplers, judging one run
(measure), and the picture."""
