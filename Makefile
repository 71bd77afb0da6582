# dcp_native: `make demo` runs the main job, `make test` runs all tests.  See README.md.
#
# Every command works from a fresh clone: it makes .venv, installs torch and builds the package first.
# With a torch already installed: make demo PYTHON=/path/to/python (its environment is used as it is).

VENV    := .venv
TORCH   := torch==2.13.0
BASE    ?= python3
CC      ?= gcc

ifdef PYTHON
RUN_PY  := $(PYTHON)
else
RUN_PY  := $(VENV)/bin/python
endif

CORE_SRC   := $(wildcard csrc/core/*.c)
CUDA_SRC   := $(wildcard csrc/cuda/cuda_*.c csrc/cuda/kernel_*.c csrc/cuda/nccl_*.c)
CTEST_SRC  := $(wildcard tests/c/test_*.c)
CTEST_AID  := $(filter-out $(CTEST_SRC),$(wildcard tests/c/*.c))
HEADERS    := $(wildcard csrc/include/*.h csrc/core/*.h csrc/cuda/*.h tests/c/*.h benchmarks/*.h)
CTESTS      = $(patsubst tests/c/%.c,$(CB)/ctest/%,$(CTEST_SRC))
T          ?= *

# Where the C tests are built.
CB      ?= build

C_WARN  := -Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wvla -Wconversion -Wno-sign-conversion
C_FLAGS := -std=c11 -D_GNU_SOURCE -O1 -g -fno-omit-frame-pointer -DDCP_DEBUG -Icsrc/include -Icsrc/core -Icsrc/cuda -Itests/c $(C_WARN)
SANITIZE ?= -fsanitize=address,undefined -fno-sanitize-recover=undefined

.PHONY: demo test test-clients test-cuda build-cuda bench lint ctest ctest-build ctest-tsan clean set-up build compile_commands FORCE

# T=name runs one.
CTEST_WANTED = $(if $(filter *,$(T)),$(CTESTS),$(addprefix $(CB)/ctest/test_,$(T)))

ctest-build: $(CTEST_WANTED)

# Two at a time, the longest first; what each prints comes when it is done.
CTEST_LONGEST = $(addprefix $(CB)/ctest/test_,commit_model crash incremental_faults agreement_faults \
    device_stream device_range device_stage)
CTEST_ORDER    = $(filter $(CTEST_LONGEST),$(CTEST_WANTED)) $(filter-out $(CTEST_LONGEST),$(CTEST_WANTED))

CTEST_LIMIT_S ?= 600

ctest: $(CTEST_WANTED)
	@printf '%s\n' $(CTEST_ORDER) | xargs -P 2 -I{} sh -c \
	    'timeout $(CTEST_LIMIT_S) {} > {}.log 2>&1; rc=$$?; echo "== {}"; cat {}.log; exit $$rc'

# Objects are kept: a chain of implicit rules would delete them.
.SECONDARY:

$(CB)/obj/%.o: csrc/core/%.c $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(C_FLAGS) $(SANITIZE) -Werror -c $< -o $@

$(CB)/obj/aid_%.o: tests/c/%.c $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(C_FLAGS) $(SANITIZE) -c $< -o $@

$(CB)/libcore.a: $(patsubst csrc/core/%.c,$(CB)/obj/%.o,$(CORE_SRC))
	@rm -f $@
	ar rcs $@ $^

# Without kernels: what runs them in tests needs no image of them.
$(CB)/obj/cuda/%.o: csrc/cuda/%.c $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(C_FLAGS) $(SANITIZE) -Werror -c $< -o $@

$(CB)/libcuda_tables.a: $(patsubst csrc/cuda/%.c,$(CB)/obj/cuda/%.o,$(CUDA_SRC))
	@rm -f $@
	ar rcs $@ $^

$(CB)/ctest/%: tests/c/%.c $(patsubst tests/c/%.c,$(CB)/obj/aid_%.o,$(CTEST_AID)) $(CB)/libcuda_tables.a $(CB)/libcore.a $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(C_FLAGS) $(SANITIZE) $< $(filter %.o,$^) $(CB)/libcuda_tables.a $(CB)/libcore.a -ldl -lpthread -o $@

# The writer process, as its tests start it.
$(CB)/ctest/dcp_writer: csrc/writer/main.c $(CB)/libcore.a $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(C_FLAGS) $(SANITIZE) -Werror $< $(CB)/libcore.a -lpthread -o $@

$(CB)/ctest/test_writer_mappings $(CB)/ctest/test_writer_message $(CB)/ctest/test_writer_process $(CB)/ctest/test_writer_survive: $(CB)/ctest/dcp_writer

# CUDA and NCCL as their tests have them.
build/fake/.built: $(wildcard tests/fake/*)
	sh tests/fake/build.sh $(CURDIR)/build/fake
	@touch $@

$(CB)/ctest/test_nccl_comm $(CB)/ctest/test_nccl_faults: build/fake/.built

# Threads of ours beside those of devices, under ThreadSanitizer: what takes a minute, or with
#     make ctest-tsan T='device_stage device_stream device_put device_range'
# what takes an hour.
TSAN_QUICK := arena device_save
ctest-tsan:
	$(MAKE) --no-print-directory CB=build/tsan SANITIZE=-fsanitize=thread CTEST_LIMIT_S=3600 \
	    T='$(if $(filter *,$(T)),$(TSAN_QUICK),$(T))' ctest

# ---- benchmarks in C: the core as the package has it, without sanitizers ----

BENCH_FLAGS := -std=c11 -D_GNU_SOURCE -O3 -g -Icsrc/include -Icsrc/core $(C_WARN)

build/bench/obj/%.o: csrc/core/%.c $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(BENCH_FLAGS) -c $< -o $@

build/bench/libcore.a: $(patsubst csrc/core/%.c,build/bench/obj/%.o,$(CORE_SRC))
	@rm -f $@
	ar rcs $@ $^

build/bench/%: benchmarks/%.c build/bench/libcore.a $(HEADERS)
	$(CC) $(BENCH_FLAGS) $< build/bench/libcore.a -lpthread -o $@

# The table over NCCL needs little of the core, and the fake libraries to run.
build/bench/nccl_comm: benchmarks/nccl_comm.c $(wildcard csrc/cuda/nccl_*.c) build/fake/.built $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(BENCH_FLAGS) -Icsrc/cuda $< csrc/cuda/cuda_api.c csrc/cuda/cuda_context.c \
	    $(wildcard csrc/cuda/nccl_*.c) csrc/core/error.c csrc/core/alloc.c -ldl -lpthread -o $@

# ---- the package: environment, build, lint ----

# What decides the package's binaries besides its sources: interpreter, torch, switches.
BUILD_ID  = $(RUN_PY) -c 'import sys, importlib.metadata as m; \
    print(sys.executable, sys.version, *(d.version for d in m.distributions(name="torch")))'
EXT_SRC  := $(wildcard csrc/core/*.[ch] csrc/cuda/*.[ch] csrc/cuda/*.cu csrc/py/*.[ch] csrc/include/*.h csrc/writer/*.c csrc/bridge/*.cpp csrc/bridge/*.h)
SETUP_SRC := setup.py pyproject.toml

ifdef PYTHON
SET_UP   :=
INSTALL   = $(RUN_PY) setup.py --quiet build_ext --inplace --force
else
SET_UP   := $(VENV)/.set-up
INSTALL   = $(RUN_PY) -m pip install --quiet --no-build-isolation --no-deps -e .
endif

set-up: $(SET_UP)

$(VENV)/.set-up: requirements-test.txt
	@test -x $(VENV)/bin/python || { echo "== making $(VENV)"; $(BASE) -m venv $(VENV); }
	@echo "== installing $(TORCH) and the test tools into $(VENV) (a few minutes the first time)"
	$(VENV)/bin/python -m pip install --quiet $(TORCH) 'setuptools>=77' wheel -r requirements-test.txt
	@touch $@

# Rewritten only when it changes, so that a build for another interpreter is a build anew.
build/.id: FORCE $(SET_UP)
	@mkdir -p build
	@id="$$($(BUILD_ID)) $$DCP_NATIVE_SANITIZE/$$DCP_NATIVE_DEBUG/$$DCP_NATIVE_COVERAGE"; \
	    [ "$$id" = "$$(cat $@ 2>/dev/null)" ] || echo "$$id" > $@

# A change of sources compiles the module it belongs to; anything else installs the package anew.
build/.built: build/.id $(SETUP_SRC) $(EXT_SRC)
	@echo "== building dcp_native for $(RUN_PY)"
	$(if $(filter build/.id $(SETUP_SRC),$?),$(INSTALL),$(RUN_PY) setup.py --quiet build_ext --inplace)
	@touch $@

build: build/.built

lint: $(SET_UP)
	$(RUN_PY) -m ruff check .

# ---- what people run ----

demo: build
	$(RUN_PY) demo/run.py

# Installs and builds what all tests need, at once: one waits for the network while others compile.
# Then C tests under sanitizers, and the rest with the built package.
test:
	$(MAKE) --no-print-directory -j3 ctest-build build build-cuda lint
	$(MAKE) --no-print-directory ctest
	$(MAKE) --no-print-directory -j2 ctest-tsan
	$(RUN_PY) -m pytest -q -n 2
	$(MAKE) --no-print-directory test-cuda

# Real clients from the registry over the package as a user installs it; not part of `make test`.
CLIENTS := build/clients

$(CLIENTS)/.set-up: tests/clients/requirements.txt
	@test -x $(CLIENTS)/bin/python || $(BASE) -m venv $(CLIENTS)
	@echo "== installing $(TORCH) and the clients into $(CLIENTS) (a few minutes the first time)"
	$(CLIENTS)/bin/python -m pip install --quiet $(TORCH) 'setuptools>=77' wheel -r $<
	@touch $@

test-clients: $(CLIENTS)/.set-up
	$(CLIENTS)/bin/python -m pip install --quiet --no-build-isolation --no-deps --force-reinstall .
	$(CLIENTS)/bin/python -m pytest -q tests/clients $(if $(filter *,$(T)),,-k '$(T)')

# torch's build for CUDA with devices and NCCL that are fakes: no GPU is needed.  It has an environment
# and a copy of the tree of its own.  With such a torch already installed:
#     make test-cuda PYTHON_CUDA=/path/to/python
CUDA_TORCH := torch==2.14.1
CUDA_VENV  := .venv-cuda
CUDA_TREE  := build/cuda-tree

ifdef PYTHON_CUDA
RUN_CUDA    := $(PYTHON_CUDA)
CUDA_SET_UP :=
else
RUN_CUDA    := $(CURDIR)/$(CUDA_VENV)/bin/python
CUDA_SET_UP := $(CUDA_VENV)/.set-up
endif

$(CUDA_VENV)/.set-up: requirements-test.txt
	@test -x $(CUDA_VENV)/bin/python || { echo "== making $(CUDA_VENV)"; $(BASE) -m venv $(CUDA_VENV); }
	@echo "== installing $(CUDA_TORCH) with CUDA's libraries into $(CUDA_VENV) (3 GB the first time)"
	$(CUDA_VENV)/bin/python -m pip install --quiet $(CUDA_TORCH) 'setuptools>=77' wheel -r $<
	@touch $@

build-cuda: $(CUDA_SET_UP)
	@echo "== building dcp_native for $(RUN_CUDA) in $(CUDA_TREE)"
	@$(RUN_CUDA) tools/copy_tree.py $(CUDA_TREE)
	@cd $(CUDA_TREE) && mkdir -p build && $(RUN_CUDA) -c 'import sys; print(sys.executable)' > build/.new && \
	    { cmp -s build/.new build/.id || rm -rf build/temp* build/lib* dcp_native/*.so; } && \
	    $(RUN_CUDA) setup.py --quiet build_ext --inplace && mv build/.new build/.id

test-cuda: build-cuda
	cd $(CUDA_TREE) && $(RUN_CUDA) -m pytest -q -n 2 tests/cuda $(if $(filter *,$(T)),,-k '$(T)')

bench: build
	$(RUN_PY) benchmarks/bench.py $(BENCH)

compile_commands: $(SET_UP)
	$(RUN_PY) tools/compile_commands.py

FORCE:

clean:
	rm -rf build dcp_native/*.so dcp_native/_writer *.egg-info compile_commands.json
