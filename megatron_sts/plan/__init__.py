"""What a run will take: pipeline layouts, the schedule simulated, what skipping gains. Must not know torch.

With n layers a chunk a step could also run the same number of layers of every chunk, chosen by depth within the chunk, instead
of whole rounds. Without a head that loses nothing (efficiency 1, above the bound of rounds). Simulated with heads, each beside the best
dense layout, at 2 and 8 micro-batches a rank: (80, PP 8, n = 2) 0.91 and 1.01, (32, PP 4, n = 2, heads of 0.65 and 2.41 layers) 0.90, 0.88 and
0.81, 0.81; rounds 0.96 and 1.00, 0.95, 0.96 and 0.88, 0.95. It also skips in quanta of 1/n of the model (standard deviation 19 of 80 layers
a step) and loses the paper's depth profile: every chunk gets the mean probability, 0.25 off at both ends at the start. Hence there is only ``rounds``.
"""
