# Two ways to install. In the Python package: plain file names, as wheels hold no symbolic links, with libksort_run and
# one line on what was built. Elsewhere: what a C program needs to build against libksort, wherever the prefix is moved.
set_target_properties(ksort_run PROPERTIES INSTALL_RPATH "$<IF:$<PLATFORM_ID:Darwin>,@loader_path,$ORIGIN>")

if(SKBUILD)
  install(TARGETS ksort ksort_run LIBRARY DESTINATION lib)
  install(FILES include/ksort.h run/ksort_run.h include/ksort_cuda.h DESTINATION include)
  file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/ksort_build.txt "${cuda_report}\n")
  install(FILES ${CMAKE_CURRENT_BINARY_DIR}/ksort_build.txt DESTINATION lib)
  return()
endif()

include(CMakePackageConfigHelpers)
set(libraries ksort)
if(TARGET ksort_cuda)
  list(APPEND libraries ksort_cuda)
endif()
file(STRINGS include/ksort.h abi_version REGEX "^#define KSORT_ABI_VERSION ")
string(REGEX REPLACE "[^0-9]" "" abi_version "${abi_version}")
set_target_properties(${libraries} PROPERTIES VERSION ${PROJECT_VERSION} SOVERSION ${abi_version})

install(TARGETS ${libraries} EXPORT ksortTargets LIBRARY DESTINATION lib)
install(FILES include/ksort.h DESTINATION include)
install(EXPORT ksortTargets NAMESPACE ksort:: DESTINATION lib/cmake/ksort)
configure_package_config_file(cmake/ksortConfig.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/ksortConfig.cmake
                              INSTALL_DESTINATION lib/cmake/ksort)
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/ksortConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/ksortConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/ksortConfigVersion.cmake
        DESTINATION lib/cmake/ksort)
configure_file(cmake/ksort.pc.in ksort.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/ksort.pc DESTINATION lib/pkgconfig)
