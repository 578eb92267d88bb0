# The commands a person types. `make` alone lists them.

PYTHON ?= python3
PY := .venv/bin/python
ARGS ?=
CLIP := ../results/preprocessing_test/input_video.mp4

.DEFAULT_GOAL := help
.PHONY: help setup live preprocess predict archive train data scripts notebooks report lab test fuzz lint bench times compare soak clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/ready ## install everything into .venv (once; about 3 GB)

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	    { echo "error: $$($(PYTHON) --version) found; expected Python 3.11 to 3.13: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -r requirements.txt
	@$(PY) -c 'import cv2' || { echo "error: OpenCV misses a system library: apt install libgl1 libglib2.0-0" >&2; exit 1; }
	@touch $@

# YuNet is tried once here: without it OpenCV's Haar cascade finds the faces. `make data` tries again.
data/models/tried: | .venv/ready
	@mkdir -p $(@D)
	@$(PY) scripts/get_data.py --only-detector || true
	@touch $@

live: setup data/models/tried ## an emotion every second, from the webcam or the bundled clip (ARGS="--show")
	@$(PY) scripts/predict_live_stream.py $(ARGS)

preprocess: setup data/models/tried ## 20 s of video become 20 or 21 faces in results/preprocessing_test
	@$(PY) scripts/preprocess.py $(ARGS)

data: setup ## download FER2013 and the YuNet face detector (ARGS="--archive some.zip")
	@$(PY) scripts/get_data.py $(ARGS)

predict: setup data/models/tried ## the accuracy on the test set (needs the data), or ARGS="--image me.jpg"
	@$(PY) scripts/predict.py $(ARGS)

.venv/archive .venv/jax: .venv/%: requirements-%.txt | .venv/ready
	$(PY) -m pip install --disable-pip-version-check -r $<
	@touch $@

archive: setup .venv/archive data/models/tried ## a folder of recordings becomes a table (ARGS="--videos FOLDER")
	@$(PY) scripts/annotate_videos.py $(ARGS)

train: setup ## train the CNN from scratch, for hours (needs the data; ARGS="--output runs/mine")
	@$(PY) scripts/train.py $(ARGS)

lab: setup ## open the notebooks in JupyterLab (as root: ARGS="--allow-root")
	$(PY) -m jupyterlab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks $(ARGS)

scripts: setup ## export the notebooks to scripts/
	@rm -rf runs/scripts
	$(PY) -m nbconvert --config tools/nbconvert_config.py --output-dir runs/scripts
	rm -f scripts/*.py && mv runs/scripts/*.py scripts/

# What the project keeps is measured on all the data, and asked for here. The live stream gets the clip, since a webcam
# never ends; 05 reads what `make bench` has measured.
notebooks: setup .venv/archive ## execute the notebooks with papermill into results/notebooks (needs the data; 30 minutes)
	@mkdir -p runs/notebooks results/notebooks
	@for notebook in notebooks/*.ipynb; do name=$$(basename $$notebook); \
	    case $$name in \
	        01*) with="-p limit 0 -p output ../results/mnist";; \
	        02*) with="-p output ../results/eda";; \
	        05*) with="-p verbose True -p limit 0 -p figures ../results";; \
	        07*) with="-p source $(CLIP) -p output ../results";; \
	        08*) with="-p output ../results/hack_cnn";; \
	        *) with="";; esac; \
	    $(PY) -m papermill -k python3 --cwd notebooks $$with $$notebook runs/notebooks/$$name && \
	    mv runs/notebooks/$$name results/notebooks/$$name || exit 1; done

report: setup ## write the executed notebooks as a web site: results/report/index.html
	@$(PY) tools/report.py $(ARGS)

# Two processes share the test files, each with one thread: more threads than cores only wait for each other.
THREADS := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 OPENCV_FOR_THREADS_NUM=1 TF_NUM_INTRAOP_THREADS=1 TF_NUM_INTEROP_THREADS=1

test: setup data/models/tried lint ## run the tests in two processes, seven minutes (ARGS="-n 4" for four)
	$(THREADS) $(PY) -m pytest -n 2 --dist loadfile $(ARGS)

fuzz: setup ## feed the readers and the command lines what nobody expects, 20,000 times each (ARGS="-k csv")
	FUZZ=20000 $(THREADS) $(PY) -m pytest tests/code/test_fuzz.py --timeout 0 $(ARGS)

CODE := utils.py training.py archive.py scripts tools tests

lint: setup ## check the style of notebooks, scripts and tests
	$(PY) -m ruff check $(CODE) notebooks
	$(PY) -m ruff format --check $(CODE)
	@$(PY) -m nbstripout --keep-id --verify notebooks/*.ipynb || \
	    { echo "error: notebooks/ is kept without outputs: .venv/bin/nbstripout --keep-id notebooks/*.ipynb" >&2; exit 1; }

bench: setup data/models/tried ## speed and memory of the live stream, on one core
	@$(PY) tests/benchmark.py --output results/benchmark.json $(ARGS)

times: setup .venv/archive data/models/tried ## what each command takes, into results/times.json and the README (ten minutes)
	@$(PY) tools/times.py

compare: setup data/models/tried ## this project beside fer and deepface, each installed for it (8 GB; 15 minutes)
	@$(PY) tools/compare.py $(ARGS)

soak: setup data/models/tried ## does the live stream run for hours: memory, threads, a camera that goes (10 minutes)
	@$(PY) tests/soak.py --output results/soak.json $(ARGS)

clean: ## remove what `make setup` made
	rm -rf .venv
