# CMake configuration of the bitsandbytes native headers.
#
#   find_package(bnb CONFIG REQUIRED)
#   bnb_add_module(_C DESTINATION my_backend kernels/bind.cpp ...)
#
# Defines the interface target bnb::headers and, for Python modules, bnb_add_module().

if(NOT TARGET bnb::headers)
  get_filename_component(_bnb_include "${CMAKE_CURRENT_LIST_DIR}/../include" ABSOLUTE)
  add_library(bnb::headers INTERFACE IMPORTED)
  set_target_properties(bnb::headers PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${_bnb_include}")
  target_compile_features(bnb::headers INTERFACE cxx_std_17)
  unset(_bnb_include)
endif()

# bnb_add_module(<name> DESTINATION <package folder> <source>...)
#
# A nanobind extension module that sees the headers and is installed into the package folder of the
# wheel. It uses the stable ABI where Python has it (3.12 and later) and carries nanobind inside, so
# that no wheel depends on another one's nanobind.
function(bnb_add_module name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "DESTINATION" "")
  if(NOT arg_DESTINATION OR NOT arg_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "bnb_add_module(${name}): give DESTINATION and the sources")
  endif()
  if(NOT Python_FOUND)
    find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module
                 OPTIONAL_COMPONENTS Development.SABIModule)
  endif()
  if(NOT COMMAND nanobind_add_module)
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -m nanobind --cmake_dir
      OUTPUT_STRIP_TRAILING_WHITESPACE OUTPUT_VARIABLE nanobind_ROOT COMMAND_ERROR_IS_FATAL ANY)
    find_package(nanobind CONFIG REQUIRED)
  endif()
  nanobind_add_module(${name} STABLE_ABI NB_STATIC ${arg_UNPARSED_ARGUMENTS})
  target_link_libraries(${name} PRIVATE bnb::headers)
  install(TARGETS ${name} LIBRARY DESTINATION ${arg_DESTINATION})
endfunction()
