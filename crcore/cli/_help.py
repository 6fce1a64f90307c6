"""What `--help` says beside the options."""

from crcore.cli._methods import METHODS

METHOD_HELP = "methods:\n" + "\n".join(f"  {method.name:17} {method.summary}" for method in METHODS.values())

DATA_HELP = """\
digits (scikit-learn's, embedded), a folder of parquet files in the Hugging Face image schema (columns img or
image, and label; files named train-*, test-* or validation-*), a folder with one sub-folder of images for each
class (with or without train/ and test/ above them), or the name of a data set on the Hugging Face hub
"""

COMPARE = f"""\
Train a low-bit network in several ways and show what each gained over plain quantization-aware training (QAT).

For each seed a float network is trained; every QAT method then starts from that float network, makes the same
number of optimizer steps, sees the same augmented images in the same order, and is tested by the same code.

{METHOD_HELP}
"""

COMPARE_EXAMPLES = """\
examples:
  crcore compare
      the embedded digits with 200 labels and resnet8: minutes on two cores
  crcore compare --data cifar10/ --model resnet18 --methods fp32,qat,qat+kd,qat+cr --weight-bits 4 \\
                 --activation-bits 4 --labels 4000 --seeds 3 --epochs 60 --out runs/x
      a folder of parquet files; stop it with Ctrl-C and continue it with the same line and --resume
  crcore compare --model mynets:small --labels 300
      your own function small(num_classes, in_channels) in mynets.py of the current folder
  crcore compare --backend keras
      the same on Keras 3; the function of a model of your own then takes (num_classes, input_shape)

the output folder holds:
  results.json                     settings, versions, and for every seed and method: accuracy and teacher_accuracy
                                   in percent, steps, seconds, and the history by epoch
  table.md                         mean and standard deviation, the gain over qat with its 95 % confidence interval
  curves.png                       accuracy against epoch
  seed0/fp32/float.safetensors     and so on: a checkpoint for each network, for `crcore evaluate` and `--init`;
                                   float.keras with --backend keras
"""

SWEEP = f"""\
Compare over a grid of settings: which lambda, which ramp, how many labels, which width.

Each point of the grid is a `crcore compare` with its values, and has the same result to the bit. A run that several
points have in common is trained once: the float networks, or plain QAT where only lambda varies. All points are
checked before the first step. All of them are trained with seed 0 first, then with seed 1, and so on.

{METHOD_HELP}
"""

SWEEP_EXAMPLES = """\
examples:
  crcore sweep --vary consistency-weight=0,0.5,1,2,5 --methods qat,qat+ema,qat+cr --out runs/lambda
      how large should lambda be? qat and qat+ema do not depend on it and are trained once
  crcore sweep --vary labels=50,100,200,400,all --vary bits=2,4 --methods qat,qat+cr --out runs/labels
      does the gain grow where labels are few? a panel of the plot for each width
  crcore sweep --data cifar10/ --labels 4000 --vary ramp-shape=constant,sigmoid \\
               --vary consistency-weight=0.5,1,2 --methods qat,qat+cr --out runs/ramps
  crcore sweep --data cifar10/ --labels 4000 --vary ramp-shape=constant,sigmoid \\
               --vary consistency-weight=0.5,1,2,5 --methods qat,qat+cr --out runs/ramps --resume
      the same line and --resume continues; values, axes, methods and seeds may be added
  crcore sweep --labels 50 --vary unlabeled=50,200,all --methods qat,qat+cr+unlabeled --out runs/unlabeled
      how much do unlabeled images bring?

--float-epochs is by default as --epochs: give it where epochs vary, for one float network.

the output folder holds:
  sweep.json        settings, axes, versions; for every point and method: accuracy and teacher_accuracy by seed, the
                    gain over qat and over the average of qat+ema with 95 % confidence intervals, and the folder of
                    its runs. Written after every run
  table.md          the same for a reader
  sweep.png         accuracy against the first axis, a panel for each combination of the others
  runs/qat+cr-.../  each run once, in a folder for each seed, as `crcore compare` writes it
"""

TRAIN = f"""\
Train one method with one seed and keep its checkpoint.

{METHOD_HELP}
"""

TRAIN_EXAMPLES = """\
examples:
  crcore train --method qat+cr --out runs/cr
      trains the float network first, then the 4-bit one; runs/cr/seed0/qat+cr/ holds both student and average
  crcore train --method qat+cr --init runs/cr/seed0/fp32/float.safetensors --weight-bits 3 --out runs/cr3
      starts from a float network that is there already
"""

EVALUATE = """\
Measure the accuracy of a checkpoint, or of a file that crcore export wrote, on test images. Model, recipe and
normalization are read from the file; a --model, --quantizer, --weight-bits or --activation-bits that is given is
checked against it. A .onnx file runs in ONNX Runtime, a .tflite file in LiteRT, both on the CPU.
"""

EVALUATE_EXAMPLES = """\
examples:
  crcore evaluate runs/x/seed0/qat+cr/student.safetensors
  crcore evaluate runs/x/seed0/qat+cr/teacher.safetensors --data cifar10/ --json
  crcore evaluate runs/x/seed0/qat+cr/teacher.onnx
"""

EXPORT = """\
Write a trained network for a runtime: its integers, scales and zero points as they were trained, nothing recomputed.

  onnx          for ONNX Runtime: batch normalization folded, weights of 3 and 4 bits stored as int4, of 1 and 2 bits
                as int2. pip install 'crcore[onnx]'
  litert        for LiteRT: int8 from input to output; weights take 8 bits whatever their width.
                pip install 'crcore[litert]'
  safetensors   no runtime: the integers packed to their bits, to be stored, and read by load_quantized

RUN is a checkpoint (.safetensors or .keras), or the folder of a method, of a seed, or of a whole run if it holds one
quantized network. The file is run before it is put in place: it must hold the trained integers and name the same class
as the trained network on 99.5 % of the images, or nothing is written.
"""

EXPORT_EXAMPLES = """\
examples:
  crcore export runs/x/seed0/qat+cr --to onnx --verify
      writes runs/x/seed0/qat+cr/teacher.onnx, and compares it with the trained network on all test images
  crcore export runs/x/seed0/qat+cr --role student --to safetensors
      writes runs/x/seed0/qat+cr/student-packed.safetensors
  crcore export runs/keras/seed0/qat/student.keras --to litert --out phone.tflite
      a network that was trained with Keras, on whichever engine; one of PyTorch goes the same way
  crcore export runs/x/seed0/qat --to onnx --opset 20
      for a runtime that does not know int4 yet: the same integers in 8 bits each

what --verify prints (--json has the same numbers):
  accuracy             of the file and of the trained network, in percent of the test images
  same class           how often both name the same class
  largest difference   of the outputs, in steps of an 8-bit output
  layers as trained    whose integers, and whose input's scale and zero point, are the trained ones
  size, latency        beside the same network in float, in the same runtime, one image on one thread
"""

REPORT = """\
Write one HTML page about a run: the verdict, the table, training curves, and each layer's weights and inputs on their
grids. The page needs no other file and no network: open it in any browser, send it, print it.

RUN is the folder that crcore compare or crcore train wrote, finished or not. Networks are shown on test images; where
a checkpoint or the data are gone, the page says so and shows the rest. Where crcore flatness or crcore sensitivity
measured a network of RUN, the page shows that too.
"""

REPORT_EXAMPLES = """\
examples:
  crcore report runs/x
      writes runs/x/report.html
  crcore report runs/x --out x.html --seed 2
      shows the networks of seed 2 layer by layer
  crcore report runs/x --data /mnt/cifar10
      the images have moved since
  crcore report runs/x --measure
      with curvature and sensitivity of the first seed's networks, which takes minutes

the page holds:
  what was run        settings, versions, the command that repeats it, and what the confidence intervals allow to say
  table and gains     as table.md, and each gain over qat with its interval
  training            accuracy, losses, lambda, the average's decay
  layer by layer      signal-to-quantization-noise ratio in dB, histograms with the grid, the codes in use
  curvature           what crcore flatness measured
  sensitivity         what crcore sensitivity measured
"""

FLATNESS = """\
Measure how flat the loss is around trained weights: the largest eigenvalues of the Hessian, its trace, and the density
of all eigenvalues. Small ones stand for a flat minimum. Of a quantized network it is the Hessian of the
straight-through surrogate that training follows (docs/flatness.md); batch normalization is as in tests.

The result is written beside each checkpoint as student-flatness.json and so on, where crcore report finds it. What
was measured with the same settings is not measured again.
"""

FLATNESS_EXAMPLES = """\
examples:
  crcore flatness runs/x/seed0/fp32 runs/x/seed0/qat runs/x/seed0/qat+cr
      every network in these folders, side by side, and runs/x/seed0/flatness.png
  crcore flatness runs/x/seed0/qat+cr/teacher.safetensors --top 10 --samples 1000 --split test
      the ten largest eigenvalues, on test images
"""

SENSITIVITY = """\
Measure how much loss and accuracy suffer: under noise on the inputs, under common corruptions of growing severity
(from CIFAR-10-C), under noise on the weights relative to the norm of each filter; and how far the loss can grow
within a radius around the weights (sharpness). Bands are 95 % confidence intervals over draws of the noise.

The result is written beside each checkpoint as student-sensitivity.json and so on, where crcore report finds it. What
was measured with the same settings is not measured again.
"""

SENSITIVITY_EXAMPLES = """\
examples:
  crcore sensitivity runs/x/seed0/fp32 runs/x/seed0/qat runs/x/seed0/qat+cr
      every network in these folders, side by side, and runs/x/seed0/sensitivity.png
  crcore sensitivity runs/x/seed0/qat+cr/student.safetensors --samples 5000 --draws 10
      more images and a narrower band
"""
